"""Efficiency: how low the loss gets at a given size of the weight change.

    L(n) = held-out loss of the solution rescaled to effective norm n,   n on one grid for all solutions of a kind

with n at `factors` of the mean of the solutions' own norms, the common norm, and the gain per squared norm
(L_base - L(n)) / n^2 beside it. Only B (or u) is rescaled. The control is a Gaussian adapter with the same norm in
every module. The ratio L / n^2 alone is not used: any loss bounded below makes it fall with n.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from aif.basins import Bench, Measured, Subject, ratio, weighted_mean
from aif.basins.norms import Grid, at_norm, grids
from aif.basins.scoring import grid_losses, losses

QUANTITIES = ("minimum loss", "norm at the minimum", "gain at the common norm")


class Options(BaseModel, extra="forbid"):
    factors: list[float] = Field([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0], min_length=1)
    controls: int = Field(1, ge=0, description="random twins per kind of solution")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """Curves L(n) and (L_base - L(n)) / n^2, and min L, its norm, and the gain at the common norm, per subject."""
    base_sums, tokens = losses(bench.base, bench.target, rows=bench.rows)
    out: list[Measured] = []
    for grid in grids(bench, options.factors, options.controls):
        for subject in grid.subjects:
            bench.say(f"efficiency: {subject.name}")
            sums, _ = grid_losses(bench.base, at_norm(subject), grid.points, bench.target, rows=bench.rows)
            out += _quantities(subject, grid, sums, base_sums, tokens)
    return out


def _quantities(subject: Subject, grid: Grid, sums: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> list[Measured]:
    """`sums` `[rows, norms]`: - ln p of every row at every norm."""
    norms = grid.norms
    parts = {"sums": sums, "tokens": tokens}
    matched = {"sums": sums[:, grid.common], "base": base, "tokens": tokens}
    who = {"subject": subject.name, "seed": subject.seed, "control": subject.control}
    what = {"metric": "efficiency", "rows": len(tokens), "row_name": "held-out prompts", **who}
    norm_axis = {"x": tuple(norms.tolist()), "x_label": "effective norm"}
    square = partial(gain_per_square, **parts, base=base, norms=norms)
    least, place = partial(minimum, **parts), partial(norm_at_minimum, **parts, norms=norms)
    return [
        Measured(quantity="loss", unit="nats/token", better="lower", value=ratio(sums, tokens), **norm_axis, **what),
        Measured(
            quantity="gain per squared norm", unit="nats/token", better="higher", value=square, **norm_axis, **what
        ),
        Measured(quantity="minimum loss", unit="nats/token", better="lower", value=least, **what),
        Measured(quantity="norm at the minimum", unit="norm", better="", value=place, **what),
        Measured(
            quantity="gain at the common norm",
            unit="nats/token",
            better="higher",
            value=partial(gain, **matched),
            **what,
        ),
    ]


def gain(w: np.ndarray, *, sums: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> Any:
    """L_base - L(n)."""
    return weighted_mean(w, sums=base, weights=tokens) - weighted_mean(w, sums=sums, weights=tokens)


def gain_per_square(w: np.ndarray, *, norms: np.ndarray, **parts: np.ndarray) -> Any:
    """(L_base - L(n)) / n^2."""
    return gain(w, **parts) / norms**2


def minimum(w: np.ndarray, *, sums: np.ndarray, tokens: np.ndarray) -> Any:
    """min over n of L(n)."""
    return weighted_mean(w, sums=sums, weights=tokens).min()


def norm_at_minimum(w: np.ndarray, *, sums: np.ndarray, tokens: np.ndarray, norms: np.ndarray) -> Any:
    """The n of the minimum."""
    return norms[weighted_mean(w, sums=sums, weights=tokens).argmin()]
