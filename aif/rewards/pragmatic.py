"""Pragmatic value as a reward: U(y) = sum_d E_Q(o_d | y) ln P(o_d | C), the utility that `efe` has too.

With it, `grpo` and `efe` read the same responses by the same reader and differ in what they do with it.
"""

from __future__ import annotations

from typing import Any

from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field, model_validator

from aif.errors import BadInput
from aif.objectives import Context
from aif.objectives.efe import Preferences, evaluation_of
from aif.objectives.terms import Evaluation
from aif.plugins import Named, plugin
from aif.rewards import Reward
from aif.types import Batch


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    reader: Named = Field(default=Named(name="probes"), description="state reader behind the reward")
    preferences: Preferences = Field(default="target", description="log-preferences, as for `efe`")
    smoothing: float = Field(default=1.0, gt=0, description="counts added per level to the rating frequencies")

    @model_validator(mode="after")
    def _reader_fits(self) -> Options:
        if self.reader.name == "ratings":
            raise ValueError("reader: `ratings` knows the corpus's answers only; samples need probes or judge")
        try:
            plugin("readers", self.reader.name, self.reader.options, "reader")
        except BadInput as error:
            raise ValueError(str(error)) from error
        return self


def pragmatic_value(evaluation: Evaluation) -> Reward:
    """The utility U of an evaluation, nats."""
    return Reward(Partial(_score, evaluate=evaluation.evaluate), evaluation.watch, evaluation.annotate)


def make(options: Options, context: Context) -> Reward:
    """From a config.

    Raises:
      BadInput: the reader cannot read this corpus, or a preference names no dimension or the wrong number of levels.
    """
    return pragmatic_value(evaluation_of(options.reader, options.preferences, options.smoothing, context))


def _score(taps: Any, batch: Batch, *, evaluate: Partial) -> Array:
    return evaluate(taps, batch)["pragmatic"]
