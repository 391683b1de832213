"""Expected free energy of responses, minimised: offline over rated candidates, online over the policy's own samples.

A policy is a response y to a prompt x, its habit prior the reference model: E(y|x) = pi_ref(y|x). With G(y) from
`aif.objectives.terms`, both forms have the policy posterior Q*(y) ~ E(y) exp(-precision G(y)) as their optimum.

    offline  KL( softmax_k(-precision G_k) || softmax_k(r_k) ),  r_k = ln pi(y_k|x) - ln E(y_k|x), K candidates a prompt
    online   F = E_pi[ ln pi - ln E + precision G ],  K samples a prompt

Online, F is estimated as the mean of  cost_k = precision G_k + sum_t KL_t  with KL_t a per-token divergence from the
habit, and its gradient as a clipped policy gradient of the cost against a leave-one-out baseline plus the divergence's
own gradient. The two together are unbiased on the first update of a rollout, whichever estimator KL_t is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from aif import preferences
from aif.errors import BadInput
from aif.objectives import Context, Objective, Rollouts
from aif.objectives import online as estimators
from aif.objectives.field import FieldPreference, by_field
from aif.objectives.logprobs import (
    group_logsumexp,
    response_logprobs,
    response_sums,
    response_weights,
    same_group,
    score_hidden,
)
from aif.objectives.terms import TERMS, Evaluation, by_reader, habit, observed
from aif.plugins import Named, plugin
from aif.policy import Policy
from aif.readers import Reader
from aif.types import Batch, Loss, Mean, Scalar, as_partial


def group_log_softmax(values: Float[Array, "B R"], batch: Batch) -> Float[Array, "B R"]:
    """ln softmax among the responses to the same prompt; 0 in empty slots."""
    return jnp.where(batch.ids >= 0, values - group_logsumexp(values, batch), 0.0)


def policy_divergence(
    G: Float[Array, "B R"],
    ratios: Float[Array, "B R"],
    batch: Batch,
    precision: Scalar,
    weight: Float[Array, "B R"] | float = 1.0,
) -> Array:
    """KL( softmax(-precision G) || softmax(ratios) ), summed over prompts, in nats; minimised.

    `weight` is what a prompt counts, given at each of its responses.

    With two candidates and G = (0, +infinity) this is the DPO loss at beta = 1.
    """
    log_target = group_log_softmax(jnp.clip(-precision * G, -1e9, 1e9), batch)
    log_model = group_log_softmax(ratios, batch)
    target = jnp.where(batch.ids >= 0, jnp.exp(log_target), 0.0)
    return jnp.sum(weight * target * jnp.where(target > 0, log_target - log_model, 0.0))


def _kind(wanted: Any) -> str:
    """Which form of preferences this is, so that an error speaks of that form alone."""
    keys = wanted if isinstance(wanted, dict) else getattr(wanted, "model_fields_set", ())
    return "text" if isinstance(wanted, str) else next((k for k in ("frame", "tier") if k in keys), "dimensions")


Preferences = Annotated[
    Annotated[Literal["target"], Tag("text")]
    | Annotated[FieldPreference, Tag("frame")]
    | Annotated[preferences.TierPreference, Tag("tier")]
    | Annotated[dict[str, list[float]], Tag("dimensions")],
    Discriminator(_kind),
]


class Online(BaseModel, extra="forbid", allow_inf_nan=False, strict=True):
    """How the policy's own samples are drawn and used."""

    samples: int = Field(default=4, ge=2, description="responses a prompt; the baseline leaves one out")
    new_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    updates: int = Field(default=1, ge=1, description="updates a rollout")
    kl: Literal["k1", "k3", "exact"] = Field(default="exact", description="per-token divergence from the habit")
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)

    @property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.samples, self.new_tokens, self.temperature, self.updates)


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    precision: float = Field(default=1.0, ge=0, description="gamma: how sharply G weighs on the policy")
    precision_end: float | None = Field(default=None, ge=0, description="gamma at the last step; linear in between")
    state_weight: float = Field(default=1.0, ge=0, description="w_s, weight of the state information gain")
    parameter_weight: float = Field(default=0.0, ge=0, description="w_p, weight of the parameter information gain")
    reader: Named = Field(default=Named(name="ratings"), description="state reader, with its options")
    preferences: Preferences = Field(
        default="target",
        description="log-preferences: `target` takes the rating frequencies of target responses, `tier: high` those "
        "of a tier; or dimension: [a number per level], with `default` for the dimensions left out; or `frame: NAME`, "
        "a text that the reference has in its context",
    )
    smoothing: float = Field(default=1.0, gt=0, description="counts added per level to the rating frequencies")
    online: Online | None = Field(default=None, description="sample from the policy; over the candidates when left out")

    @model_validator(mode="after")
    def _reader_fits(self) -> Options:
        if self.online and self.reader.name == "ratings":
            raise ValueError("reader: `ratings` knows the corpus's answers only; `online` needs probes or judge")
        try:
            plugin("readers", self.reader.name, self.reader.options, "reader")
        except BadInput as error:
            raise ValueError(str(error)) from error
        return self


def efe(
    reader: Reader | Evaluation,
    C: Float[Array, "S O"] | None = None,
    *,
    precision: float = 1.0,
    precision_end: float | None = None,
    state_weight: float = 1.0,
    parameter_weight: float = 0.0,
    online: Online | None = None,
) -> Objective:
    """Expected free energy with a state reader and log-preferences C (nats, normalised per dimension), or with an
    evaluation of one's own; offline over the candidates, or `online` over samples."""
    if isinstance(reader, Reader) and C is None:
        raise BadInput("efe: a reader needs log-preferences C, one row per dimension")
    evaluation = by_reader(reader, C) if isinstance(reader, Reader) else reader  # pyright: ignore[reportArgumentType]
    prepare = Partial(
        _prepare if online is None else _prepare_online,
        evaluate=evaluation.evaluate,
        watch=as_partial(evaluation.watch),
        state_weight=state_weight,
        parameter_weight=parameter_weight,
    )
    about = {"annotate": evaluation.annotate, "name": "efe"}

    def loss(gamma: float) -> Partial:
        if online is None:
            return Partial(_loss, precision=gamma)
        kl = Partial(estimators.KL[online.kl])
        return Partial(_online_loss, precision=gamma, kl=kl, low=online.clip_low, high=online.clip_high)

    def schedule(progress: float) -> Partial:
        end = precision if precision_end is None else precision_end
        return loss(precision + progress * (end - precision))

    if online is None:
        return Objective(loss(precision), prepare, responses="all", schedule=schedule, **about)
    return Objective(
        loss(precision),
        prepare,
        responses="none",
        schedule=schedule,
        rollouts=online.rollouts,
        frozen_head=online.kl == "exact",
        **about,
    )


def make(options: Options, context: Context) -> Objective:
    """From a config.

    Raises:
      BadInput: the reader cannot read this corpus, or a preference names no dimension or the wrong number of levels.
    """
    numbers = options.model_dump(include={"precision", "precision_end", "state_weight", "parameter_weight"})
    evaluation = evaluation_of(options.reader, options.preferences, options.smoothing, context)
    return efe(evaluation, online=options.online, **numbers)


def evaluation_of(reader: Named, wanted: Preferences, smoothing: float, context: Context) -> Evaluation:
    """The configured reader against the configured preferences.

    Raises:
      BadInput: see `make`.
    """
    module, checked = plugin("readers", reader.name, reader.options, "reader")
    if isinstance(wanted, dict):
        C = preferences.configured(wanted, context)
    elif isinstance(wanted, preferences.TierPreference):
        C = preferences.tiered(wanted, context, smoothing)
    else:
        C = preferences.empirical(context.target_ratings, len(context.levels), smoothing)
    evaluation = by_reader(module.make(checked, context), C)
    return by_field(evaluation, wanted, context) if isinstance(wanted, FieldPreference) else evaluation


def _prepare(reference: Policy, batch: Batch, key: Array, **how) -> dict[str, Array]:
    facts, hidden = observed(reference, batch, **how)
    return {"reference_logps": habit(reference, batch, hidden), **facts}


def _prepare_online(reference: Policy, batch: Batch, key: Array, **how) -> dict[str, Array]:
    facts, hidden = observed(reference, batch, **how)
    hidden = reference(batch).hidden if hidden is None else hidden
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    logps = score_hidden(hidden, reference.head, batch)
    return {"reference_token_logps": logps, "reference_hidden": picked, **facts}


def _loss(policy: Policy, batch: Batch, *, precision: Scalar) -> Loss:
    """The divergence, and the terms of G expected under q_k = softmax_k(r_k), the tilt of the policy on its habit."""
    ratios = response_logprobs(policy, batch) - batch.extras["reference_logps"]
    filled = batch.ids >= 0
    log_q = group_log_softmax(ratios, batch)
    weight = response_weights(batch)
    q = weight * jnp.where(filled, jnp.exp(log_q), 0.0)
    prompts = jnp.sum(q)  # every prompt's q sums to its weight
    expect = lambda x: Mean(jnp.sum(q * x), prompts)  # noqa: E731
    divergence = Mean(policy_divergence(batch.extras["G"], ratios, batch, precision, weight), prompts)
    terms = {name: expect(batch.extras[name]) for name in (*TERMS, "G")}
    size = jnp.sum(same_group(batch), axis=-1)
    terms["kl_habit"] = expect(log_q + jnp.log(jnp.maximum(size, 1)))  # the habit's own tilt is uniform
    terms["entropy"] = expect(-log_q)
    return Loss(divergence, {"divergence": divergence, **terms})


def _online_loss(policy: Policy, batch: Batch, *, precision: Scalar, kl: Partial, low: Scalar, high: Scalar) -> Loss:
    """- sum_t clipped(rho_t, A) + sum_t KL_t per response, with A = -(cost - leave-one-out mean of the cost)."""
    hidden = policy(batch).hidden
    logps = score_hidden(hidden, policy.head, batch)
    divergences = kl(policy, hidden, logps, batch)
    filled = (batch.ids >= 0).astype(jnp.float32)
    drift = response_sums(divergences, batch)
    cost = jax.lax.stop_gradient(precision * batch.extras["G"] + drift)
    advantage = estimators.per_token(-estimators.leave_one_out(cost * filled, batch), batch)
    ratio = jnp.exp(logps - batch.extras["sampled_logps"])
    gained = response_sums(estimators.clipped(ratio, advantage, low=low, high=high), batch)
    count = jnp.sum(filled)
    mean = lambda x: Mean(jnp.sum(filled * jax.lax.stop_gradient(x)), count)  # noqa: E731
    terms = {"free_energy": mean(cost), "kl_habit": mean(drift), "entropy": mean(-response_sums(logps, batch))}
    terms |= {name: mean(batch.extras[name]) for name in (*TERMS, "G")}
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    terms["clipped"] = Mean(jnp.sum(outside * (batch.weights > 0)), jnp.sum(batch.weights > 0))
    terms["length"] = mean(response_sums(jnp.ones_like(logps), batch))
    return Loss(Mean(jnp.sum(filled * (drift - gained)), count), terms)
