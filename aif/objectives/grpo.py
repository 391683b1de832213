"""Group-relative policy optimisation: reward maximisation under a KL penalty, on the policy's own samples.

    A_k = (u_k - mean_k u) / std_k u,   minimise  - mean_t clipped(rho_t, A) + beta mean_t KL_t

(Shao et al. 2024, eq. 3 and 4). The reward u is the pragmatic value U of the same reader and preferences that `efe`
uses, so that the two differ in what they do with it; `normalise: false` leaves the division by the deviation out.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float
from pydantic import Field

from aif.objectives import Context, Objective
from aif.objectives import efe as free
from aif.objectives import online as estimators
from aif.objectives.logprobs import response_sums, same_group, score_hidden
from aif.objectives.terms import Evaluation, by_reader
from aif.policy import Policy
from aif.readers import Reader
from aif.types import Batch, Loss, Mean, Scalar, as_partial


class Options(free.Online):
    beta: float = Field(default=0.04, ge=0, description="weight of the divergence from the reference")
    normalise: bool = Field(default=True, description="divide advantages by the group's standard deviation")
    average: Literal["sequence", "token"] = Field(default="sequence", description="what the loss is averaged over")
    kl: Literal["k1", "k3", "exact"] = "k3"
    reader: free.Named = Field(default=free.Named(name="probes"), description="state reader behind the reward")
    preferences: free.Preferences = "target"
    smoothing: float = Field(default=1.0, gt=0)


def group_relative(values: Float[Array, "B R"], batch: Batch, *, normalise: Scalar) -> Float[Array, "B R"]:
    """(u - mean) / (std + 1e-4) within a prompt's group (std over K - 1); `normalise` 0 leaves the division out."""
    same = same_group(batch).astype(values.dtype)
    count = jnp.maximum(jnp.sum(same, axis=-1), 1)
    mean = jnp.einsum("brs,bs->br", same, values) / count
    square = jnp.einsum("brs,bs->br", same, jnp.square(values)) - count * jnp.square(mean)
    deviation = jnp.sqrt(jnp.maximum(square, 0.0) / jnp.maximum(count - 1, 1))
    return (values - mean) / jnp.where(normalise > 0, deviation + 1e-4, 1.0)


def grpo(
    evaluation: Evaluation | Reader, C: Float[Array, "S O"] | None = None, options: Options | None = None
) -> Objective:
    """GRPO on the pragmatic value of an evaluation, or of a reader and log-preferences C."""
    options = options or Options()
    if isinstance(evaluation, Reader):
        evaluation = by_reader(evaluation, C)  # pyright: ignore[reportArgumentType]
    prepare = Partial(
        free._prepare_online,
        evaluate=evaluation.evaluate,
        watch=as_partial(evaluation.watch),
        state_weight=0.0,
        parameter_weight=0.0,
    )
    loss = Partial(
        _loss,
        beta=options.beta,
        kl=Partial(estimators.KL[options.kl]),
        low=options.clip_low,
        high=options.clip_high,
        normalise=float(options.normalise),
        by_token=float(options.average == "token"),
    )
    return Objective(
        loss,
        prepare,
        responses="none",
        name="grpo",
        annotate=evaluation.annotate,
        rollouts=options.rollouts,
        frozen_head=options.kl == "exact",
    )


def make(options: Options, context: Context) -> Objective:
    """From a config."""
    evaluation = free.evaluation_of(options.reader, options.preferences, options.smoothing, context)
    return grpo(evaluation, options=options)


def _loss(
    policy: Policy,
    batch: Batch,
    *,
    beta: Scalar,
    kl: Partial,
    low: Scalar,
    high: Scalar,
    normalise: Scalar,
    by_token: Scalar,
) -> Loss:
    hidden = policy(batch).hidden
    logps = score_hidden(hidden, policy.head, batch)
    reward = batch.extras["pragmatic"]
    advantage = estimators.per_token(group_relative(reward, batch, normalise=normalise), batch)
    ratio = jnp.exp(logps - batch.extras["sampled_logps"])
    divergences = kl(policy, hidden, logps, batch)
    tokens = beta * divergences - estimators.clipped(ratio, advantage, low=low, high=high)
    filled = (batch.ids >= 0).astype(jnp.float32)
    length = response_sums(jnp.ones_like(logps), batch)
    count, words = jnp.sum(filled), jnp.sum(length)
    summed = response_sums(tokens, batch)
    of_tokens, of_sequences = Mean(jnp.sum(summed), words), Mean(jnp.sum(summed / jnp.maximum(length, 1)), count)
    total = jax.tree.map(lambda t, s: jnp.where(by_token > 0, t, s), of_tokens, of_sequences)
    mean = lambda x: Mean(jnp.sum(filled * jax.lax.stop_gradient(x)), count)  # noqa: E731
    terms = {"reward": mean(reward), "kl_habit": mean(response_sums(divergences, batch)), "length": mean(length)}
    terms["entropy"] = mean(-response_sums(logps, batch))
    return Loss(total, terms)
