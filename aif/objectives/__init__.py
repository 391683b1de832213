"""Objectives: two pure functions each, and a factory that takes the hyperparameters.

`prepare(reference, batch, key)` runs outside the gradient and returns facts per response slot `[B, R, ...]`; they are
computed once per data set, cached by response and come back in `batch.extras`. `loss(policy, batch)` returns a `Loss`.

A file of this folder that defines `Options` (a pydantic model) and `make(options, context)` is an objective that
configs can name; nothing else needs to be edited. Functions bound with `jax.tree_util.Partial` take new
hyperparameters without compiling again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from aif.errors import BadInput
from aif.policy import Policy
from aif.types import Batch, Loss


def no_frame(name: str) -> str:
    """The `frame` of a context that has none."""
    raise BadInput(f"preferences.frame: there is no frame {name!r} here; run from a config, or pass C")


def no_tiers() -> np.ndarray:
    """The `tiers` of a context without a corpus."""
    raise BadInput("preferences.tier: there are no rows to sort into tiers here; run from a config, or pass C")


class Unfitted(BadInput):
    """There are no activations of a reference model yet; what can be checked without them has been."""


def unfitted() -> Any:
    """The `rated` of a context without a reference."""
    raise Unfitted("there is no reference model to fit on here; build the objective within an experiment")


@dataclass(frozen=True)
class Context:
    """What an objective's factory may read of the experiment.

    Attributes:
      dimensions, levels: of the scale; `scale` itself, with its rubric, is for judges.
      ratings: of all training responses, `[responses, S]` with -1 where unrated; `target_ratings` of the target ones.
      rated: the reference's mean residuals of all training responses (`aif.directions.probes.Rated`); raises `Unfitted`
        before there is a reference, so factories check first and call it last.
      reference, tokenizer: the model that the stage starts from.
      frame: the text of a frame by its name.
      liked: whether a response is its prompt's target, `[responses]`; `prompts`: the prompt it answers; `tiers`: the
        tier of that prompt's row.
      steps: that the stage takes.
    """

    dimensions: tuple[str, ...]
    levels: tuple[str, ...]
    ratings: np.ndarray
    target_ratings: np.ndarray
    scale: Any = None
    rated: Callable[[], Any] = unfitted
    reference: Policy | None = None
    tokenizer: Any = None
    frame: Callable[[str], str] = no_frame
    liked: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    prompts: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    tiers: Callable[[], np.ndarray] = no_tiers
    steps: int = 1


def nothing(reference: Policy, batch: Batch, key: Array) -> dict[str, Array]:
    """The `prepare` of an objective that needs nothing but the batch."""
    return {}


@dataclass(frozen=True)
class Rollouts:
    """How an online objective samples: `samples` responses a prompt, and updates made on each rollout."""

    samples: int = 4
    new_tokens: int = 48
    temperature: float = 1.0
    updates: int = 1


@dataclass(frozen=True)
class Beside:
    """Training rows outside `corpus.domains` that come with every micro-batch as `batch.beside`: of these domains (of
    all others when empty), `rows` packed rows of them (as many as of the first kind when None), with the candidates
    that `responses` names."""

    domains: tuple[str, ...] = ()
    rows: int | None = None
    responses: str = "target"


@dataclass(frozen=True)
class Objective:
    """What to minimise.

    Attributes:
      loss: `(policy, batch) -> Loss`; `loss.total` is minimised, `loss.terms` are logged.
      prepare: `(reference, batch, key) -> {name: [B, R, ...]}`, cached per response.
      responses: which candidates of a prompt take part: "target", "pair" (target and one contrast), "all", or "none"
        where `rollouts` samples them from the policy.
      name: for logs and tables.
      schedule: the loss at a share of the run (0 at the first step, 1 at the last), where a hyperparameter changes.
      rollouts: how responses are sampled; `batch.extras` then holds `sampled_logps [B, N]` too, and what `prepare`
        returns may be per scored token.
      annotate: facts from the words of the responses, found on the host before `prepare` (see `aif.readers`).
      frozen_head: the loss reads the reference through the policy's own head, so the head must not be trained.
      beside: rows of a second kind, from outside the domains that are trained on.
      cached: whether the facts of `prepare` are kept per response; if not, it runs on every batch under the reference
        and may return facts of any shape with a row's worth in each row, of `batch` or of `batch.beside`.
      about: what was found when it was made (a reward's held-out accuracy, say), kept beside the stage's log.
    """

    loss: Callable[[Policy, Batch], Loss]
    prepare: Callable[[Policy, Batch, Array], dict[str, Array]] = nothing
    responses: str = "target"
    name: str = "custom"
    schedule: Callable[[float], Callable[[Policy, Batch], Loss]] | None = None
    rollouts: Rollouts | None = None
    annotate: Callable[..., dict[str, np.ndarray]] | None = None
    frozen_head: bool = False
    beside: Beside | None = None
    cached: bool = True
    about: dict[str, Any] = field(default_factory=dict)


__all__ = ["Beside", "Context", "Objective", "Rollouts", "Unfitted", "nothing"]
