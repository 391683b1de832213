"""Metastability: does a solution stay, and does it come back? What more training does to it.

    toggle    start at one arm's solution, train with another arm's objective: cosine with every solution, and the norm
    return(x) = (L(x') - L(x'')) / (L(x') - L(x)),   x' = x turned by noise e (as in stability), x'' = x' after k steps

The toggle needs its controls: an arm under its own objective still moves, and so does the general solution under the
narrow objective. The control of the return is a random solution of the same norm, trained for as many steps: what any
start would gain. More training follows the arm's own stage (objective, optimizer, data), with a fresh optimizer state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, Field

from aif.adapter import random_like
from aif.basins import Bench, Further, Measured, Subject
from aif.basins.geometry import about, alignment, cosine, moving
from aif.basins.norms import moved
from aif.basins.scoring import carrying, losses
from aif.basins.stability import perturb, too_small
from aif.errors import BadInput
from aif.types import Adapter

QUANTITIES = ("gain regained",)  # and `cosine with NAME` of the toggles


class Options(BaseModel, extra="forbid"):
    toggle: list[tuple[str, str]] = Field([], description="[solution to start from, arm whose objective goes on]")
    steps: list[int] = Field(
        [8], min_length=1, description="of more training, each length anew; the longest for the return"
    )
    eps: float = Field(0.6, gt=0, le=1, description="noise that a solution has to come back from")
    back: bool = Field(True, description="measure the return from noise")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """Cosines and norm along every toggle, and the share of the lost gain that training on regains, per solution.

    Raises:
      BadInput: a toggle names no arm of the comparison.
    """
    if bench.further is None:
        raise BadInput("measure.metastability: this bench cannot train on (Bench.further)")
    solutions = [s for s in moved(bench) if s.name in bench.arms]
    for pair in options.toggle:
        for name in pair:
            if name not in bench.arms:
                raise BadInput(
                    f"measure.metastability.toggle: no arm is called {name!r}; arms are {', '.join(bench.arms)}"
                )
    out: list[Measured] = []
    for start, by in options.toggle:
        for subject in (s for s in solutions if s.name == start):
            known = [s for s in solutions if s.seed == subject.seed]
            out += _toggled(bench, bench.further, options, subject, by, known)
    return out + (_returns(bench, bench.further, options, solutions) if options.back else [])


def _toggled(
    bench: Bench, further: Further, options: Options, subject: Subject, by: str, known: list[Subject]
) -> list[Measured]:
    steps = sorted({0, *options.steps})
    path = [subject.adapter if n == 0 else further(subject, by, n) for n in steps]
    who = Subject(f"{subject.name}, then {by}", {}, subject.seed)
    axis = {"x": tuple(float(n) for n in steps), "x_label": "more steps"}
    out = []
    for other in known:
        parts = [alignment(x, other.adapter) for x in path]
        stacked = moving({key: np.stack([p[key].ravel() for p in parts], axis=1) for key in parts[0]})
        what = about(who, "weight matrices", len(stacked["both"]), metric="metastability", better="")
        last = {key: x[:, -1] for key, x in stacked.items()}
        name = f"cosine with {other.name}"
        out.append(
            Measured(quantity=f"{name}, by step", unit="cosine", value=partial(cosine, **stacked), **axis, **what)
        )
        out.append(Measured(quantity=name, unit="cosine", value=partial(cosine, **last), **what))
    squares = moving({"own": np.stack([alignment(x, x)["both"].ravel() for x in path], axis=1)})["own"]
    what = about(who, "weight matrices", len(squares), metric="metastability", better="")
    out.append(Measured(quantity="norm, by step", unit="norm", value=partial(norm, squares=squares), **axis, **what))
    return out


def norm(w: np.ndarray, *, squares: np.ndarray) -> Any:
    """sqrt(sum_m w_m ||x_m||^2), the effective norm for w = 1."""
    return np.sqrt(w @ squares)


def _returns(bench: Bench, further: Further, options: Options, solutions: list[Subject]) -> list[Measured]:
    score = lambda adapter: losses(carrying(bench.base, adapter), bench.target, rows=bench.rows)  # noqa: E731
    base, tokens = losses(bench.base, bench.target, rows=bench.rows)
    out = []
    for subject in solutions:
        bench.say(f"metastability: {subject.name}, turned by {options.eps:g} and trained on")
        own, _ = score(subject.adapter)
        turned = perturb(subject.adapter, bench.key, jnp.float32(options.eps))
        twin = random_like(subject.adapter, jax.random.fold_in(bench.key, 1))
        starts: list[tuple[str, bool, Adapter]] = [("", False, turned), ("random start for ", True, twin)]
        for prefix, control, adapter in starts:
            lost, _ = score(adapter)
            why = too_small(lost - own, base)
            if why:
                bench.note(f"metastability: {prefix}{subject.name} is left out: noise loses nothing to regain; {why}.")
                continue
            longest = max(options.steps)
            after, _ = score(further(Subject("", adapter, subject.seed), subject.name, longest))
            who = Subject(f"{prefix}{subject.name}", {}, subject.seed, control)
            what = about(who, "held-out prompts", len(tokens), metric="metastability", unit="%")
            value = partial(regained, after=after, lost=lost, own=own)
            out.append(Measured(quantity=QUANTITIES[0], better="higher", value=value, **what))
    return out


def regained(w: np.ndarray, *, after: np.ndarray, lost: np.ndarray, own: np.ndarray) -> Any:
    """100 (L(x') - L(x'')) / (L(x') - L(x)), percent; the token counts cancel."""
    return 100 * (w @ (lost - after)) / (w @ (lost - own))
