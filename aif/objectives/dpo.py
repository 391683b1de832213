"""Direct preference optimisation: a loss of the margin between the log-ratios of a chosen and a rejected response.

    m = [ln pi(y_c|x) - ln pi_ref(y_c|x)] - [ln pi(y_r|x) - ln pi_ref(y_r|x)],   minimise  (1 - s) f(m) + s f(-m)

    sigmoid  f(m) = - ln sigmoid(beta m)        Rafailov et al. 2023, eq. 7
    hinge    f(m) = max(0, 1 - beta m)          Zhao et al. 2023 (SLiC)
    ipo      f(m) = (m - 1 / (2 beta))^2        Azar et al. 2023, eq. 17; log-ratios are means over a response's tokens

s is the chance that a label is flipped. Without a reference its log-probabilities count as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float
from pydantic import BaseModel, Field

from aif.objectives import Context, Objective
from aif.objectives.logprobs import response_logprobs, response_sums, response_weights, token_logprobs
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
    variant: str | Callable[[Array, Scalar], Array] = "sigmoid",
) -> Float[Array, "*shape"]:
    """(1 - s) f(m) + s f(-m), m = log-ratio of chosen minus log-ratio of rejected; minimised.

    Log-probabilities of whole responses in nats, or their means per token for `ipo`; `variant` is f or its name.
    """
    f = VARIANTS[variant] if isinstance(variant, str) else variant
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return (1 - label_smoothing) * f(margin, beta) + label_smoothing * f(-margin, beta)


def sigmoid(margin: Float[Array, "*shape"], beta: Scalar) -> Float[Array, "*shape"]:
    """- ln sigmoid(beta m)."""
    return -jax.nn.log_sigmoid(beta * margin)


def hinge(margin: Float[Array, "*shape"], beta: Scalar) -> Float[Array, "*shape"]:
    """max(0, 1 - beta m)."""
    return jax.nn.relu(1 - beta * margin)


def ipo(margin: Float[Array, "*shape"], beta: Scalar) -> Float[Array, "*shape"]:
    """(m - 1 / (2 beta))^2."""
    return jnp.square(margin - 1 / (2 * beta))


VARIANTS = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}


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


def no_reference(reference: Policy, batch: Batch, key: Array) -> dict[str, Array]:
    """0 in place of ln E(y | x), whatever is known of it."""
    return {"reference_logps": jnp.zeros(batch.ids.shape)}


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    beta: float = Field(default=0.1, gt=0)
    variant: Literal["sigmoid", "hinge", "ipo"] = Field(default="sigmoid", description="loss of the margin")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="chance that a label is flipped")
    per_token: bool | None = Field(
        default=None, description="log-ratios as means over a response's tokens; as usual for the variant if left out"
    )
    reference_free: bool = Field(default=False, description="the reference's log-probabilities count as 0")


def preference(
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    per_token: bool | None = None,
    reference_free: bool = False,
) -> Objective:
    """DPO on the target response against one contrast response of the same prompt."""
    loss = Partial(
        _loss,
        beta=beta,
        label_smoothing=label_smoothing,
        f=Partial(VARIANTS[variant]),
        per_token=float(variant == "ipo" if per_token is None else per_token),
    )
    return Objective(loss, no_reference if reference_free else reference_logprobs, responses="pair", name="dpo")


def make(options: Options, context: Context) -> Objective:
    """From a config."""
    return preference(**options.model_dump())


def _loss(
    policy: Policy, batch: Batch, *, beta: Scalar, label_smoothing: Scalar, f: Partial, per_token: Scalar
) -> Loss:
    logps = token_logprobs(policy, batch)
    length = jnp.where(per_token > 0, jnp.maximum(response_sums(jnp.ones_like(logps), batch), 1.0), 1.0)
    chosen, rejected, present = pairs(response_sums(logps, batch) / length, batch)
    ref_chosen, ref_rejected, _ = pairs(batch.extras["reference_logps"] / length, batch)
    losses = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing, variant=f)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    weight = jnp.where(present, pairs(response_weights(batch), batch)[0], 0.0)
    mean = lambda x: Mean(jnp.sum(weight * x), jnp.sum(weight))  # noqa: E731
    terms = {"margin": mean(margin), "accuracy": mean((margin > 0).astype(jnp.float32))}
    return Loss(mean(losses), {"dpo": mean(losses), **terms})
