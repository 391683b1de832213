"""Direct preference optimisation (Rafailov et al. 2023, eq. 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float
from pydantic import BaseModel, Field

from aif.objectives import Context, Objective
from aif.objectives.logprobs import response_logprobs, response_weights
from aif.policy import Policy
from aif.types import Batch, Loss, Mean, Scalar


def dpo(
    policy_chosen: Float[Array, "*shape"],
    policy_rejected: Float[Array, "*shape"],
    reference_chosen: Float[Array, "*shape"],
    reference_rejected: Float[Array, "*shape"],
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "*shape"]:
    """-(1-s) ln sigmoid(beta m) - s ln sigmoid(-beta m), m = log-ratio of chosen minus log-ratio of rejected.

    Log-probabilities of whole responses in nats; the result is minimised. `s` is the chance that a label is flipped.
    """
    margin = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def pairs(values: Float[Array, "B R"], batch: Batch) -> tuple[Array, Array, Array]:
    """(chosen, rejected, present) per prompt slot `[B, R]`, from values per response slot and `preference`."""
    R = batch.ids.shape[1]
    owner = jax.nn.one_hot(batch.group, R) * (batch.ids >= 0)[..., None]
    side = lambda on: jnp.einsum("br,brg->bg", jnp.where(on, values, 0.0), owner)  # noqa: E731
    liked = batch.extras["preference"] > 0
    return side(liked), side(~liked), owner.sum(axis=1) > 0


def reference_logprobs(reference: Policy, batch: Batch, key: Array) -> dict[str, Array]:
    """ln E(y | x): the reference model's log-probability of each response, once per data set."""
    if "reference_logps" in batch.extras:
        return {"reference_logps": batch.extras["reference_logps"]}
    return {"reference_logps": response_logprobs(reference, batch)}


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)


def preference(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """DPO on the target response against one contrast response of the same prompt."""
    loss = Partial(_loss, beta=beta, label_smoothing=label_smoothing)
    return Objective(loss, reference_logprobs, responses="pair", name="dpo")


def make(options: Options, context: Context) -> Objective:
    """From a config."""
    return preference(beta=options.beta, label_smoothing=options.label_smoothing)


def _loss(policy: Policy, batch: Batch, *, beta: Scalar, label_smoothing: Scalar) -> Loss:
    chosen, rejected, present = pairs(response_logprobs(policy, batch), batch)
    ref_chosen, ref_rejected, _ = pairs(batch.extras["reference_logps"], batch)
    losses = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    weight = jnp.where(present, pairs(response_weights(batch), batch)[0], 0.0)
    mean = lambda x: Mean(jnp.sum(weight * x), jnp.sum(weight))  # noqa: E731
    terms = {"margin": mean(margin), "accuracy": mean((margin > 0).astype(jnp.float32))}
    return Loss(mean(losses), {"dpo": mean(losses), **terms})
