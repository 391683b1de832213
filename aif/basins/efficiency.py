"""Efficiency: how low the loss gets at a given size of the weight change.

    L(n) = held-out loss of the solution rescaled to effective norm n,   n on one grid for all solutions of a kind

with n from `low` to `high` times the mean of the solutions' own norms, and the gain per squared norm
(L_base - L(n)) / n^2 compared at matched n. Only B (or u) is rescaled. The control is a Gaussian adapter with the same
norm in every module. The ratio L / n^2 alone is not used: any loss bounded below makes it fall with n.
"""

from __future__ import annotations

import jax
import numpy as np
from pydantic import BaseModel, Field

from aif.adapter import effective_norm, random_like, to_norm
from aif.basins import Bench, Measured, Subject, ratio
from aif.basins.scoring import grid_losses, losses


class Options(BaseModel, extra="forbid"):
    points: int = Field(10, ge=2)
    low: float = Field(0.2, gt=0)
    high: float = Field(2.0, gt=0)
    controls: int = Field(1, ge=0, description="random twins per kind of solution")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """Curves L(n) and (L_base - L(n)) / n^2, and min L, its norm, and the gain at the mean own norm, per subject."""
    base_sums, tokens = losses(bench.base, bench.target, rows=bench.rows)
    out: list[Measured] = []
    for kind in dict.fromkeys(s.kind for s in bench.subjects):
        subjects = [s for s in bench.subjects if s.kind == kind and not s.control]
        mean_norm = float(np.mean([float(effective_norm(s.adapter)) for s in subjects]))
        grid = mean_norm * np.linspace(options.low, options.high, options.points)
        for k in range(options.controls):
            twin = random_like(subjects[-1].adapter, jax.random.fold_in(bench.key, k))
            subjects.append(Subject(f"random {kind}", twin, k, control=True))
        for subject in subjects:
            bench.say(f"efficiency: {subject.name}")
            adapters = [to_norm(subject.adapter, n) for n in np.append(grid, mean_norm)]
            sums, _ = grid_losses(bench.base, adapters, bench.target, rows=bench.rows)
            out += _quantities(subject, grid, mean_norm, sums, base_sums, tokens)
    return out


def _quantities(
    subject: Subject, grid: np.ndarray, mean_norm: float, sums: np.ndarray, base: np.ndarray, tokens: np.ndarray
) -> list[Measured]:
    """`sums` `[rows, points + 1]`: the last column is the mean own norm."""
    curve, matched, at_base = ratio(sums[:, :-1], tokens), ratio(sums[:, -1], tokens), ratio(base, tokens)
    who = {"subject": subject.name, "seed": subject.seed, "control": subject.control}
    what = {"metric": "efficiency", "rows": len(tokens), "row_name": "held-out prompts", **who}
    norm_axis = {"x": tuple(grid.tolist()), "x_label": "effective norm"}
    gain = lambda w: (at_base(w) - curve(w)) / grid**2  # noqa: E731
    drop = lambda w: at_base(w) - matched(w)  # noqa: E731
    return [
        Measured(quantity="loss", unit="nats/token", better="lower", value=curve, **norm_axis, **what),
        Measured(quantity="gain per squared norm", unit="nats/token", better="higher", value=gain, **norm_axis, **what),
        Measured(quantity="minimum loss", unit="nats/token", better="lower", value=lambda w: curve(w).min(), **what),
        Measured(
            quantity="norm at the minimum", unit="norm", better="", value=lambda w: grid[curve(w).argmin()], **what
        ),
        Measured(quantity="gain at the common norm", unit="nats/token", better="higher", value=drop, **what),
    ]
