"""Stability: how much of the gain survives orthogonal noise of a given size.

    x'(e) = sqrt(1 - e^2) x + e y,   y orthogonal to x, ||y|| = ||x||
    reported: 100 (L(x'(e)) - L(x)) / (L_base - L(x))   percent of the gain lost, mean over noise seeds

x is each of A and B of every module and layer (or u of every layer) as a flat vector, so the product is perturbed
twice. 0 is untouched, 100 is back at the base model, more is worse than the base model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from pydantic import BaseModel, Field

from aif.basins import Bench, Measured, Subject, weighted_mean
from aif.basins.scoring import grid_losses, losses
from aif.types import Adapter

QUANTITIES = ("mean gain lost",)
LEAST_GAIN = 0.002  # of the base model's loss; below it the percentage lost is left out


class Options(BaseModel, extra="forbid"):
    eps: list[float] = Field([0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], min_length=1)
    noise_seeds: int = Field(10, ge=1)


@jax.jit
def perturb(adapter: Adapter, key: Array, eps: Array) -> Adapter:
    """x'(e) for A and B (or u) of every module and layer; each keeps its norm."""

    def turn(x: Array, key: Array) -> Array:
        flat = x.reshape(x.shape[0], -1)
        drawn = jax.random.normal(key, flat.shape)
        square = jnp.sum(flat * flat, axis=1, keepdims=True)
        across = drawn - flat * jnp.sum(drawn * flat, axis=1, keepdims=True) / jnp.where(square > 0, square, 1.0)
        y = across * jnp.sqrt(square) / jnp.linalg.norm(across, axis=1, keepdims=True)
        return (jnp.sqrt(1 - eps**2) * flat + eps * y).reshape(x.shape)

    out: Adapter = {}
    for number, (name, target) in enumerate(adapter.items()):
        keys = {leaf: jax.random.fold_in(jax.random.fold_in(key, number), k) for k, leaf in enumerate(("a", "b", "u"))}
        out[name] = {leaf: turn(x, keys[leaf]) if leaf in keys else x for leaf, x in target.items()}
    return out


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The curve over e, and its mean (the area) as one number, per subject."""
    base_sums, tokens = losses(bench.base, bench.target, rows=bench.rows)
    out: list[Measured] = []
    for subject in (s for s in bench.subjects if not s.control):
        bench.say(f"stability: {subject.name}")
        own, _ = losses(bench.base.replace(adapter=subject.adapter), bench.target, rows=bench.rows)
        gain = (base_sums.sum() - own.sum()) / base_sums.sum()
        if gain < LEAST_GAIN:
            bench.note(
                f"stability: {subject.name} is left out: it gains {gain:.1%} of the base model's loss, and a share "
                f"of a gain below {LEAST_GAIN:.1%} means nothing."
            )
            continue
        points = []
        for e in options.eps:
            noisy = [
                perturb(subject.adapter, jax.random.fold_in(bench.key, k), jnp.float32(e))
                for k in range(options.noise_seeds)
            ]
            points.append(grid_losses(bench.base, noisy, bench.target, rows=bench.rows)[0].mean(axis=1))
        out += _quantities(subject, np.array(options.eps), np.stack(points, axis=1), own, base_sums, tokens)
    return out


def _quantities(
    subject: Subject, eps: np.ndarray, noisy: np.ndarray, own: np.ndarray, base: np.ndarray, tokens: np.ndarray
) -> list[Measured]:
    parts = {"noisy": noisy, "own": own, "base": base, "tokens": tokens}
    curve, area = partial(lost, **parts), partial(mean_lost, **parts)
    what = {"metric": "stability", "subject": subject.name, "seed": subject.seed, "control": subject.control}
    what |= {"rows": len(tokens), "row_name": "held-out prompts", "better": "lower"}
    return [
        Measured(quantity="gain lost", unit="%", value=curve, x=tuple(eps.tolist()), x_label="noise e", **what),
        Measured(quantity="mean gain lost", unit="%", value=area, **what),
    ]


def lost(w: np.ndarray, *, noisy: np.ndarray, own: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> Any:
    """100 (L(x'(e)) - L(x)) / (L_base - L(x)), percent."""
    at_noise, at_own, at_base = (weighted_mean(w, sums=s, weights=tokens) for s in (noisy, own, base))
    return 100 * (at_noise - at_own) / (at_base - at_own)


def mean_lost(w: np.ndarray, **parts: np.ndarray) -> Any:
    """Its mean over e."""
    return lost(w, **parts).mean()
