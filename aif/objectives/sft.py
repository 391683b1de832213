"""Supervised fine-tuning: token-mean cross-entropy on response tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from aif.objectives import Objective
from aif.objectives.logprobs import token_logprobs
from aif.policy import Policy
from aif.types import Batch, Loss, Mean


def cross_entropy(logps: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Mean:
    """- sum w ln p / sum w, nats per token; minimised."""
    return Mean(-jnp.sum(weights * logps), jnp.sum(weights))


def sft() -> Objective:
    """Cross-entropy of the target responses; a row's tier weight multiplies its tokens."""

    def loss(policy: Policy, batch: Batch) -> Loss:
        total = cross_entropy(token_logprobs(policy, batch), batch.weights)
        return Loss(total, {"cross_entropy": total})

    return Objective(loss, name="sft")
