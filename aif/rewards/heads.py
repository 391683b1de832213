"""Linear reward heads on mean residuals: chosen by cross-validation grouped by prompt, reported on held-out prompts.

    r(y) = w . (h(y) - mean h),   h(y) the mean residual of the frozen reference over the response's tokens, one layer

What a head is fitted to is a `Task`; this file knows how to choose its layer and penalty, and how to apply it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.directions.probes import Rated, basis_of, folds_of
from aif.errors import BadInput
from aif.rewards import Reward
from aif.slots import response_means
from aif.types import Batch


class HeadOptions(BaseModel, extra="forbid", allow_inf_nan=False):
    folds: int = Field(default=5, ge=2, description="of the cross-validation, grouped by prompt")
    layers: list[int] | None = Field(default=None, description="layers to choose from; every third when left out")
    penalties: list[float] = Field(
        default=[10.0, 100.0, 1000.0], min_length=1, description="L2 penalties to choose from"
    )
    seed: int = 0


class Head(NamedTuple):
    """The reward `h . weights + bias` on the residual after `layer`."""

    layer: int
    weights: np.ndarray
    bias: float


@dataclass(frozen=True)
class Task:
    """What heads are fitted to, over N responses.

    Attributes:
      fit: `(features [n, r], numbers of the responses [n], penalty) -> weights [r]`; features are centred.
      loss: of held-out rewards `[N]`, to choose layer and penalty by.
      report: of held-out rewards `[N]` and a mask of responses: numbers by name.
      shuffled: the same task with its labels shuffled, as a control.
    """

    fit: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    loss: Callable[[np.ndarray], float]
    report: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    shuffled: Task | None = None


def held_out(x: np.ndarray, fold: np.ndarray, task: Task, penalty: float) -> np.ndarray:
    """The reward `[N]` of every response from the head fitted on the other folds' prompts."""
    out = np.zeros(len(x))
    for k in range(int(fold.max()) + 1):
        train = np.flatnonzero(fold != k)
        basis = basis_of(x[train])
        out[fold == k] = basis.of(x[fold == k]) @ task.fit(basis.of(x[train]), train, penalty)
    return out


def fit_head(data: Rated, task: Task, options: HeadOptions) -> tuple[Head, dict[str, Any]]:
    """The head with the least held-out loss, fitted on all responses, and what it does on held-out prompts: the report
    as a whole, its spread over folds, and the control on shuffled labels.

    Raises:
      BadInput: an activation is not finite, a layer does not exist, or prompts are too few.
    """
    L = data.means.shape[1]
    layers = options.layers or list(range(2, L, 3)) or [L - 1]
    wrong = [l for l in layers if not 0 <= l < L]
    if wrong:
        raise BadInput(f"reward.layers: layer {wrong[0]} is out of range; the model has layers 0..{L - 1}")
    if not np.isfinite(data.means).all():
        raise BadInput("reward: an activation is not finite; check the model's weights and the compute dtype")
    fold = folds_of(data.prompts, options.folds, options.seed)
    x = data.means.astype(np.float64)
    trials = {(l, p): held_out(x[:, l], fold, task, p) for l in layers for p in options.penalties}
    layer, penalty = min(trials, key=lambda k: task.loss(trials[k]))
    rewards = trials[layer, penalty]
    about = {"layer": layer, "penalty": penalty, "prompts": len(np.unique(data.prompts)), "held_out": {}}
    parts = [task.report(rewards, fold == k) for k in range(options.folds)]
    for name, value in task.report(rewards, np.ones(len(fold), bool)).items():
        about["held_out"][name] = {"value": value, "folds": [p[name] for p in parts if np.isfinite(p[name])]}
    if task.shuffled is not None:
        control = held_out(x[:, layer], fold, task.shuffled, penalty)
        about["shuffled_labels"] = task.report(control, np.ones(len(fold), bool))
    return _on_residuals(x[:, layer], layer, task, penalty), about


def _on_residuals(x: np.ndarray, layer: int, task: Task, penalty: float) -> Head:
    basis = basis_of(x)
    w = task.fit(basis.of(x), np.arange(len(x)), penalty)
    raw = (basis.axes @ w) / basis.scale
    return Head(layer, raw, -float(basis.mean @ raw))


def linear(head: Head, about: dict[str, Any]) -> Reward:
    """A head as a reward."""
    values = {"weights": jnp.asarray(head.weights, jnp.float32), "bias": head.bias, "layer": jnp.int32(head.layer)}
    return Reward(Partial(_score, **values), watch=response_means, about=about)


def _score(taps: Array, batch: Batch, *, weights: Array, bias: Array, layer: Array) -> Array:
    means = jnp.take(taps, layer, axis=0)  # [B, R, D]
    return jnp.where(batch.ids >= 0, means @ weights + bias, 0.0)
