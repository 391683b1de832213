"""Objectives: two pure functions each, and a factory that takes the hyperparameters.

`prepare(reference, batch, key)` runs outside the gradient and returns facts per response slot `[B, R, ...]`; they are
computed once per data set, cached by response and come back in `batch.extras`. `loss(policy, batch)` returns a `Loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jax import Array

from aif.policy import Policy
from aif.types import Batch, Loss


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


__all__ = ["Objective", "nothing"]
