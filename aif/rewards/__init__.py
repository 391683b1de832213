"""Rewards: a number per response, which `grpo` maximises under a divergence from the reference.

A reward is a file of this folder with `Options` and `make(options, context)`; configs name it by `reward: {name: ...}`.
Those that are fitted read the frozen reference's mean residuals over a response's tokens, the same features as probes,
in the one forward pass that the reference's log-probabilities need anyway; the policy cannot reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from aif.readers import Answer
from aif.types import Batch, Tap


@dataclass(frozen=True)
class Reward:
    """How responses are rewarded.

    Attributes:
      score: `(taps, batch) -> [B, R]`, maximised; a `jax.tree_util.Partial` whose arrays may change without compiling.
      watch: `(batch) -> tap` over the reference's residual stream; its values come back stacked over layers as `taps`.
      annotate: `(answers) -> {name: [responses, ...]}`, facts that `score` finds in `batch.extras`.
      about: how well it does on prompts it was not fitted on, and how it was chosen.
    """

    score: Callable[[Any, Batch], Array]
    watch: Callable[[Batch], Tap] | None = None
    annotate: Callable[[Sequence[Answer]], dict[str, np.ndarray]] | None = None
    about: dict[str, Any] = field(default_factory=dict)


__all__ = ["Reward"]
