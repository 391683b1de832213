"""Stability: how much of the gain survives orthogonal noise of a given size.

    x'(e) = sqrt(1 - e^2) x + e y,   y orthogonal to x, ||y|| = ||x||
    reported: 100 (L(x'(e)) - L(x)) / (L_base - L(x))   percent of the gain lost, mean over noise seeds

x is each of A and B of every module and layer (or u of every layer, or every weight's change) as a flat vector, so the
product A B is perturbed twice. 0 is untouched, 100 is back at the base model, more is worse than the base model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.adapter import DRAWN
from aif.basins import Bench, Measured, Subject, weighted_mean
from aif.basins.generality import unclear
from aif.basins.norms import moved
from aif.basins.scoring import carrying, grid_losses, losses
from aif.types import Adapter

QUANTITIES = ("mean gain lost",)
LEAST_GAIN = 0.002  # of the base model's loss; below it the percentage lost is left out


class Options(BaseModel, extra="forbid"):
    eps: list[float] = Field([0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], min_length=1)
    noise_seeds: int = Field(10, ge=1)


@jax.jit
def perturb(adapter: Adapter, key: Array, eps: Array) -> Adapter:
    """x'(e) for A and B (or u, or d) of every module and layer; each keeps its norm."""

    def turn(x: Array, key: Array) -> Array:
        flat = x.reshape(x.shape[0], -1)
        drawn = jax.random.normal(key, flat.shape)
        square = jnp.sum(flat * flat, axis=1, keepdims=True)
        across = drawn - flat * jnp.sum(drawn * flat, axis=1, keepdims=True) / jnp.where(square > 0, square, 1.0)
        length = jnp.linalg.norm(across, axis=1, keepdims=True)
        y = across * jnp.sqrt(square) / jnp.where(length > 0, length, 1.0)
        return (jnp.sqrt(1 - eps**2) * flat + eps * y).reshape(x.shape)

    out: Adapter = {}
    for number, (name, target) in enumerate(adapter.items()):
        keys = {leaf: jax.random.fold_in(jax.random.fold_in(key, number), k) for k, leaf in enumerate(DRAWN)}
        out[name] = {leaf: turn(x, keys[leaf]) if leaf in keys else x for leaf, x in target.items()}
    return out


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The curve over e, and its mean (the area) as one number, per subject."""
    base_sums, tokens = losses(bench.base, bench.target, rows=bench.rows)
    eps = np.array(options.eps)
    out: list[Measured] = []
    for subject in moved(bench):
        own, _ = losses(carrying(bench.base, subject.adapter), bench.target, rows=bench.rows)
        why = too_small(base_sums - own, base_sums)
        if why:
            bench.note(f"stability: {subject.name} is left out: {why}.")
            continue
        noisy = np.zeros((len(tokens), len(eps)))
        for number in range(options.noise_seeds):
            bench.say(f"stability: {subject.name}, noise seed {number + 1} of {options.noise_seeds}")
            family = Partial(perturb, subject.adapter, jax.random.fold_in(bench.key, number))
            noisy += grid_losses(bench.base, family, jnp.float32(eps), bench.target, rows=bench.rows)[0]
        out += _quantities(subject, eps, noisy / options.noise_seeds, own, base_sums, tokens)
    return out


def too_small(gain: np.ndarray, base: np.ndarray) -> str:
    """Why a share of this gain means nothing; empty when it does. `gain` and `base` are sums per row, nats."""
    share = gain.sum() / base.sum()
    if share < LEAST_GAIN:
        return (
            f"it gains {share:.1%} of the base model's loss, and a share of a gain below {LEAST_GAIN:.1%} means nothing"
        )
    why = unclear(gain)
    return f"its gain per row is {why}" if why else ""


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
