"""Connectivity: is there a barrier on the straight line between two solutions?

    L(t) = held-out loss of (1 - t) x + t y,   barrier = max_t [ L(t) - ((1 - t) L(0) + t L(1)) ]

exact for low-rank adapters: their ranks stand side by side, so no gauge of A and B matters. Two solutions of one basin
have a barrier of about zero. The control is the line from a solution to its random twin of the same norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.adapter import between
from aif.basins import Bench, Measured, ratio
from aif.basins.geometry import about, pairs
from aif.basins.scoring import grid_losses

QUANTITIES = ("barrier from {arm}",)  # of every solution from those before it


class Options(BaseModel, extra="forbid"):
    points: int = Field(5, ge=3, description="points on the line, both ends among them")
    controls: int = Field(1, ge=0, description="random twins per kind of solution")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The loss along the line and the barrier, for every pair of solutions of a kind and seed."""
    at = np.linspace(0, 1, options.points)
    axis = {"x": tuple(at.tolist()), "x_label": "share of the way"}
    out: list[Measured] = []
    for first, second in pairs(bench, options.controls):
        bench.say(f"connectivity: {first.name} to {second.name}")
        line = Partial(between, first.adapter, second.adapter)
        sums, tokens = grid_losses(bench.base, line, jnp.float32(at), bench.target, rows=bench.rows)
        what = about(second, "held-out prompts", len(tokens), metric="connectivity", unit="nats/token")
        height = partial(barrier, sums=sums, tokens=tokens, at=at)
        out += [
            Measured(quantity=f"loss from {first.name}", better="lower", value=ratio(sums, tokens), **axis, **what),
            Measured(quantity=f"barrier from {first.name}", better="", value=height, **what),
        ]
    return out


def barrier(w: np.ndarray, *, sums: np.ndarray, tokens: np.ndarray, at: np.ndarray) -> Any:
    """max over t of L(t) minus the straight line between its ends; never below zero, its value at the ends."""
    loss = (w @ sums) / (w @ tokens)
    return np.max(loss - ((1 - at) * loss[0] + at * loss[-1]))
