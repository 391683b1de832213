"""Group-relative policy optimisation: reward maximisation under a KL penalty, on the policy's own samples.

    A_k = (u_k - mean_k u) / std_k u,   minimise  - mean_t clipped(rho_t, A) + beta mean_t KL_t

(Shao et al. 2024, eq. 3 and 4). The reward u is a file of `aif/rewards`: the pragmatic value that `efe` reads too, a
Bradley-Terry model of preference pairs, or a regression on ratings. `normalise: false` leaves the division by the
deviation out; with `average: constant` as well it is Dr. GRPO (Liu et al. 2025).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Bool, Float
from pydantic import Field, model_validator

from aif.errors import BadInput
from aif.objectives import Context, Objective
from aif.objectives import online as estimators
from aif.objectives.efe import Online
from aif.objectives.logprobs import response_sums, same_group, score_hidden
from aif.objectives.terms import Evaluation
from aif.plugins import Named, plugin
from aif.policy import Policy
from aif.rewards import Reward
from aif.rewards.pragmatic import pragmatic_value
from aif.types import Batch, Loss, Mean, Scalar, as_partial


class Options(Online):
    beta: float = Field(default=0.04, ge=0, description="weight of the divergence from the reference")
    normalise: bool = Field(default=True, description="divide advantages by the group's standard deviation")
    average: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="over samples of their tokens' mean, over all tokens, or the sum over samples x new_tokens",
    )
    kl: Literal["k3", "exact"] = Field(default="k3", description="per-token divergence from the reference")
    unbiased_kl: bool = Field(
        default=False,
        description="weigh k3 by the ratio, so that its gradient is the divergence's (as TRL does by default)",
    )
    reward: Named = Field(default=Named(name="pragmatic"), description="what is maximised, with its options")

    @model_validator(mode="after")
    def _reward_fits(self) -> Options:
        try:
            plugin("rewards", self.reward.name, self.reward.options, "reward")
        except BadInput as error:
            raise ValueError(str(error)) from error
        if self.unbiased_kl and self.kl == "exact":
            raise ValueError("unbiased_kl: the exact divergence has no bias to correct; leave it out, or use kl: k3")
        return self


def group_relative(values: Float[Array, "B R"], batch: Batch, *, normalise: Scalar) -> Float[Array, "B R"]:
    """(u - mean) / (std + 1e-4) within a prompt's group (std over K - 1); `normalise` 0 leaves the division out.

    Values are counted from the group's least one, so that equal ones have an advantage of exactly 0.
    """
    same = same_group(batch)
    member = same.astype(values.dtype)
    count = jnp.maximum(jnp.sum(member, axis=-1), 1)
    least = jnp.min(jnp.where(same, values[:, None, :], jnp.inf), axis=-1)
    above = jnp.where(same, values[:, None, :] - least[..., None], 0.0)  # [B, R, R]
    mean = jnp.sum(above, axis=-1) / count
    square = jnp.sum(member * jnp.square(above - mean[..., None]), axis=-1)
    deviation = jnp.sqrt(square / jnp.maximum(count - 1, 1))
    own = jnp.where(batch.ids >= 0, values - least, 0.0)
    return (own - mean) / jnp.where(normalise > 0, deviation + 1e-4, 1.0)


def surrogate(
    logps: Float[Array, "*shape"],
    old_logps: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    divergences: Float[Array, "*shape"],
    *,
    beta: Scalar,
    low: Scalar,
    high: Scalar,
    unbiased: Scalar = 0.0,
) -> Float[Array, "*shape"]:
    """beta KL_t - min(rho_t A, clip(rho_t, 1 - low, 1 + high) A), rho_t = pi / pi_old; per token, minimised.

    With `unbiased` above 0, KL_t is multiplied by rho_t (DeepSeek-V3.2, arXiv 2512.02556).
    """
    ratio = jnp.exp(logps - old_logps)
    penalty = beta * jnp.where(unbiased > 0, ratio, 1.0) * divergences
    return penalty - estimators.clipped(ratio, advantages, low=low, high=high)


def averages(tokens: Float[Array, "B N"], batch: Batch, room: Scalar) -> tuple[Mean, Mean, Mean]:
    """Of a loss per token: the mean over samples of their own means, the mean over all tokens, and the sum over `room`
    tokens a sample. A sample of no tokens counts 0."""
    summed, length = response_sums(tokens, batch), response_sums(jnp.ones_like(tokens), batch)
    samples = jnp.sum(batch.ids >= 0).astype(jnp.float32)
    whole = jnp.sum(summed)
    return (
        Mean(jnp.sum(summed / jnp.maximum(length, 1)), samples),
        Mean(whole, jnp.sum(length)),
        Mean(whole, samples * room),
    )


def grpo(reward: Reward | Evaluation, options: Options | None = None) -> Objective:
    """GRPO on a reward, or on the pragmatic value of an evaluation."""
    options = options or Options()
    reward = reward if isinstance(reward, Reward) else pragmatic_value(reward)
    loss = Partial(
        _loss,
        beta=options.beta,
        kl=Partial(estimators.KL[options.kl]),
        low=options.clip_low,
        high=options.clip_high,
        normalise=float(options.normalise),
        unbiased=float(options.unbiased_kl),
        average=jnp.array([options.average == name for name in ("sequence", "token", "constant")]),
        room=float(options.new_tokens),
    )
    exact = options.kl == "exact"
    return Objective(
        loss,
        Partial(_prepare_exact if exact else _prepare, score=reward.score, watch=as_partial(reward.watch)),
        responses="none",
        name="grpo",
        annotate=reward.annotate,
        rollouts=options.rollouts,
        frozen_head=exact,
        about=reward.about,
    )


def make(options: Options, context: Context) -> Objective:
    """From a config: the reward is fitted on the reference that the stage starts from, where it is fitted.

    Raises:
      BadInput: the corpus has not what the reward needs.
    """
    module, checked = plugin("rewards", options.reward.name, options.reward.options, "reward")
    return grpo(module.make(checked, context), options)


def _prepare(reference: Policy, batch: Batch, key: Array, *, score: Partial, watch: Partial | None) -> dict[str, Array]:
    """The reward of every sample and the reference's log-probabilities, in one forward pass."""
    return _observed(reference, batch, score, watch)[0]


def _prepare_exact(
    reference: Policy, batch: Batch, key: Array, *, score: Partial, watch: Partial | None
) -> dict[str, Array]:
    """`_prepare`, and the reference's residual where a token is predicted."""
    facts, hidden = _observed(reference, batch, score, watch)
    return {**facts, "reference_hidden": jnp.take_along_axis(hidden, batch.index[..., None], axis=1)}


def _observed(reference: Policy, batch: Batch, score: Partial, watch: Partial | None) -> tuple[dict[str, Array], Array]:
    hidden, taps, _ = reference(batch, tap=None if watch is None else watch(batch))
    logps = score_hidden(hidden, reference.head, batch)
    return {"reference_token_logps": logps, "reward": score(taps, batch)}, hidden


def _loss(
    policy: Policy,
    batch: Batch,
    *,
    beta: Scalar,
    kl: Partial,
    low: Scalar,
    high: Scalar,
    normalise: Scalar,
    unbiased: Scalar,
    average: Bool[Array, "three"],
    room: Scalar,
) -> Loss:
    hidden = policy(batch).hidden
    logps = score_hidden(hidden, policy.head, batch)
    reward, old = batch.extras["reward"], batch.extras["sampled_logps"]
    advantage = estimators.per_token(group_relative(reward, batch, normalise=normalise), batch)
    divergences = kl(policy, hidden, logps, batch)
    tokens = surrogate(logps, old, advantage, divergences, beta=beta, low=low, high=high, unbiased=unbiased)
    total = jax.tree.map(lambda *x: jnp.select(list(average), x), *averages(tokens, batch, room))
    filled = (batch.ids >= 0).astype(jnp.float32)
    mean = lambda x: Mean(jnp.sum(filled * jax.lax.stop_gradient(x)), jnp.sum(filled))  # noqa: E731
    terms = {"reward": mean(reward), "kl_habit": mean(response_sums(divergences, batch))}
    terms |= {"length": mean(response_sums(jnp.ones_like(logps), batch)), "entropy": mean(-response_sums(logps, batch))}
    ratio = jnp.exp(logps - old)
    outside = ((ratio < 1 - low) | (ratio > 1 + high)) & (batch.weights > 0)
    terms["clipped"] = Mean(jnp.sum(outside).astype(jnp.float32), jnp.sum(batch.weights > 0).astype(jnp.float32))
    return Loss(total, terms)
