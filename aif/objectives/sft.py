"""Supervised fine-tuning: token-mean cross-entropy on response tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from pydantic import BaseModel

from aif.objectives import Context, Objective
from aif.objectives.logprobs import token_logprobs
from aif.policy import Policy
from aif.types import Batch, Loss, Mean


def cross_entropy(logps: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Mean:
    """- sum w ln p / sum w, nats per token; minimised."""
    return Mean(-jnp.sum(weights * logps), jnp.sum(weights))


class Options(BaseModel, extra="forbid"):
    """SFT has no hyperparameters of its own."""


def sft() -> Objective:
    """Cross-entropy of the target responses; a row's tier weight multiplies its tokens."""
    return Objective(_loss, name="sft")


def make(options: Options, context: Context) -> Objective:
    """From a config."""
    return sft()


def _loss(policy: Policy, batch: Batch) -> Loss:
    total = cross_entropy(token_logprobs(policy, batch), batch.weights)
    return Loss(total, {"cross_entropy": total})
