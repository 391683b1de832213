"""Expected free energy over candidate responses (offline active inference).

A policy is a response y to a prompt x, its habit prior the reference model: E(y|x) = pi_ref(y|x). With K candidates
per prompt, r_k = ln pi_theta(y_k|x) - ln E(y_k|x), and G_k the expected free energy of the states a reader sees in y_k:

    minimise  KL( softmax_k(-precision G_k) || softmax_k(r_k) )

At the optimum pi_theta is the policy posterior Q*(y) ~ E(y) exp(-precision G(y)) on that support.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float
from pydantic import BaseModel, Field

from aif import free_energy
from aif.errors import BadInput
from aif.objectives import Context, Objective
from aif.objectives.dpo import reference_logprobs
from aif.objectives.logprobs import group_logsumexp, response_logprobs, same_group
from aif.policy import Policy
from aif.readers import Reader, Reading, empirical_preferences, normalise_preferences, ratings
from aif.types import Batch, Loss, Mean, Scalar

TERMS = ("pragmatic", "state_gain", "parameter_gain")


def group_log_softmax(values: Float[Array, "B R"], batch: Batch) -> Float[Array, "B R"]:
    """ln softmax among the responses to the same prompt; 0 in empty slots."""
    return jnp.where(batch.ids >= 0, values - group_logsumexp(values, batch), 0.0)


def policy_divergence(G: Float[Array, "B R"], ratios: Float[Array, "B R"], batch: Batch, precision: Scalar) -> Array:
    """KL( softmax(-precision G) || softmax(ratios) ), summed over prompts, in nats; minimised.

    With two candidates and G = (0, +infinity) this is the DPO loss at beta = 1.
    """
    log_target = group_log_softmax(jnp.clip(-precision * G, -1e9, 1e9), batch)
    log_model = group_log_softmax(ratios, batch)
    target = jnp.where(batch.ids >= 0, jnp.exp(log_target), 0.0)
    return jnp.sum(target * jnp.where(target > 0, log_target - log_model, 0.0))


def terms_of(reading: Reading, C: Float[Array, "S O"]) -> dict[str, Float[Array, "B R"]]:
    """U, I_s and I_p of every response, summed over the dimensions the reader knows, in nats."""

    def one(qs: Array, A: Array, pA: Array, C: Array) -> dict[str, Array]:
        return free_energy.expected_free_energy_terms([A], [C], [qs], [[0]], pA=[pA])

    per_dimension = jax.vmap(one, in_axes=(0, 0, 0, 0))
    terms = jax.vmap(jax.vmap(lambda qs: per_dimension(qs, reading.A, reading.pA, C)))(reading.states)
    return {name: jnp.sum(terms[name] * reading.known, axis=-1) for name in TERMS}


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    precision: float = Field(1.0, ge=0, description="gamma: how sharply G weighs on the policy")
    state_weight: float = Field(1.0, ge=0, description="w_s, weight of the state information gain")
    parameter_weight: float = Field(0.0, ge=0, description="w_p, weight of the parameter information gain")
    agreement: float = Field(0.8, gt=0, le=1, description="chance that a rating names the true level")
    strength: float = Field(16.0, gt=0, description="Dirichlet counts per state behind the reliability matrix")
    preferences: Literal["target"] | dict[str, list[float]] = Field(
        "target",
        description="log-preferences: `target` takes the rating frequencies of target responses; or dimension: "
        "[a number per level], with `default` for the dimensions left out",
    )
    smoothing: float = Field(1.0, gt=0, description="counts added per level to the rating frequencies")


def efe(
    reader: Reader,
    C: Float[Array, "S O"],
    *,
    precision: float = 1.0,
    state_weight: float = 1.0,
    parameter_weight: float = 0.0,
) -> Objective:
    """Offline expected free energy with a state reader and log-preferences C (nats, normalised per dimension)."""
    prepare = Partial(_prepare, reader=reader, C=C, state_weight=state_weight, parameter_weight=parameter_weight)
    return Objective(Partial(_loss, precision=precision), prepare, responses="all", name="efe")


def make(options: Options, context: Context) -> Objective:
    """From a config: ratings reader, preferences from the target's ratings or from the config.

    Raises:
      BadInput: the corpus has no ratings, or a preference names no dimension or the wrong number of levels.
    """
    S, O = len(context.dimensions), len(context.levels)
    if not (context.ratings >= 0).any():
        raise BadInput("corpus: `efe` reads ratings and no row of this corpus has any; rate the candidates")
    if options.preferences == "target":
        C = empirical_preferences(context.target_ratings, O, options.smoothing)
    else:
        C = _configured(options.preferences, context)
    weights = {"state_weight": options.state_weight, "parameter_weight": options.parameter_weight}
    reader = ratings(S, O, agreement=options.agreement, strength=options.strength)
    return efe(reader, C, precision=options.precision, **weights)


def _configured(preferences: dict[str, list[float]], context: Context) -> Array:
    table = []
    unknown = [d for d in preferences if d not in (*context.dimensions, "default")]
    if unknown:
        raise BadInput(
            f"preferences.{unknown[0]}: the scale has no such dimension; it has {', '.join(context.dimensions)}"
        )
    for dimension in context.dimensions:
        row = preferences.get(dimension, preferences.get("default", [0.0] * len(context.levels)))
        if len(row) != len(context.levels):
            raise BadInput(
                f"preferences.{dimension}: {len(row)} numbers for the {len(context.levels)} levels; give one each"
            )
        table.append(row)
    return normalise_preferences(jnp.array(table, jnp.float32))


def _prepare(
    reference: Policy,
    batch: Batch,
    key: Array,
    *,
    reader: Reader,
    C: Array,
    state_weight: Scalar,
    parameter_weight: Scalar,
) -> dict[str, Array]:
    terms = terms_of(reader(reference, batch), C)
    G = -(terms["pragmatic"] + state_weight * terms["state_gain"] + parameter_weight * terms["parameter_gain"])
    return {**reference_logprobs(reference, batch, key), "G": G, **terms}


def _loss(policy: Policy, batch: Batch, *, precision: Scalar) -> Loss:
    """The divergence, and the terms of G expected under q_k = softmax_k(r_k), the tilt of the policy on its habit."""
    ratios = response_logprobs(policy, batch) - batch.extras["reference_logps"]
    filled = batch.ids >= 0
    log_q = group_log_softmax(ratios, batch)
    q = jnp.where(filled, jnp.exp(log_q), 0.0)
    prompts = jnp.sum(q)  # every prompt's q sums to one
    expect = lambda x: Mean(jnp.sum(q * x), prompts)  # noqa: E731
    divergence = Mean(policy_divergence(batch.extras["G"], ratios, batch, precision), prompts)
    terms = {name: expect(batch.extras[name]) for name in (*TERMS, "G")}
    size = jnp.sum(same_group(batch), axis=-1)
    terms["kl_habit"] = expect(log_q + jnp.log(jnp.maximum(size, 1)))  # the habit's own tilt is uniform
    terms["entropy"] = expect(-log_q)
    return Loss(divergence, {"divergence": divergence, **terms})
