"""Objectives: two pure functions each, and a factory that takes the hyperparameters.

`prepare(reference, batch, key)` runs outside the gradient and returns facts per response slot `[B, R, ...]`; they are
computed once per data set, cached by response and come back in `batch.extras`. `loss(policy, batch)` returns a `Loss`.

A file of this folder that defines `Options` (a pydantic model) and `make(options, context)` is an objective that
configs can name; nothing else needs to be edited. Functions bound with `jax.tree_util.Partial` take new
hyperparameters without compiling again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax import Array

from aif.policy import Policy
from aif.types import Batch, Loss


@dataclass(frozen=True)
class Context:
    """What an objective's factory may read of the experiment: the scale, and the ratings of all training responses
    and of the target ones, `[responses, S]` with -1 where unrated."""

    dimensions: tuple[str, ...]
    levels: tuple[str, ...]
    ratings: np.ndarray
    target_ratings: np.ndarray


def nothing(reference: Policy, batch: Batch, key: Array) -> dict[str, Array]:
    """The `prepare` of an objective that needs nothing but the batch."""
    return {}


@dataclass(frozen=True)
class Objective:
    """What to minimise.

    Attributes:
      loss: `(policy, batch) -> Loss`; `loss.total` is minimised, `loss.terms` are logged.
      prepare: `(reference, batch, key) -> {name: [B, R, ...]}`, cached per response.
      responses: which candidates of a prompt take part: "target", "pair" (target and one contrast) or "all".
      name: for logs and tables.
    """

    loss: Callable[[Policy, Batch], Loss]
    prepare: Callable[[Policy, Batch, Array], dict[str, Array]] = nothing
    responses: str = "target"
    name: str = "custom"


__all__ = ["Context", "Objective", "nothing"]
