"""Expected free energy over candidate responses (offline active inference).

A policy is a response y to a prompt x, its habit prior the reference model: E(y|x) = pi_ref(y|x). With K candidates
per prompt, r_k = ln pi_theta(y_k|x) - ln E(y_k|x), and G_k the expected free energy of the states a reader sees in y_k:

    minimise  KL( softmax_k(-precision G_k) || softmax_k(r_k) )

At the optimum pi_theta is the policy posterior Q*(y) ~ E(y) exp(-precision G(y)) on that support.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from aif import free_energy
from aif.objectives import Objective
from aif.objectives.dpo import reference_logprobs
from aif.objectives.logprobs import group_logsumexp, response_logprobs
from aif.policy import Policy
from aif.readers import Reader, Reading
from aif.types import Batch, Loss, Mean

TERMS = ("pragmatic", "state_gain", "parameter_gain")


def group_log_softmax(values: Float[Array, "B R"], batch: Batch) -> Float[Array, "B R"]:
    """ln softmax among the responses to the same prompt; 0 in empty slots."""
    return jnp.where(batch.ids >= 0, values - group_logsumexp(values, batch), 0.0)


def policy_divergence(G: Float[Array, "B R"], ratios: Float[Array, "B R"], batch: Batch, precision: float) -> Array:
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


def efe(
    reader: Reader,
    C: Float[Array, "S O"],
    *,
    precision: float = 1.0,
    state_weight: float = 1.0,
    parameter_weight: float = 0.0,
) -> Objective:
    """Offline expected free energy with a state reader and log-preferences C (nats, normalised per dimension)."""

    def prepare(reference: Policy, batch: Batch, key: Array) -> dict[str, Array]:
        terms = terms_of(reader(reference, batch), C)
        G = -(terms["pragmatic"] + state_weight * terms["state_gain"] + parameter_weight * terms["parameter_gain"])
        return {**reference_logprobs(reference, batch, key), "G": G, **terms}

    def loss(policy: Policy, batch: Batch) -> Loss:
        ratios = response_logprobs(policy, batch) - batch.extras["reference_logps"]
        filled = batch.ids >= 0
        log_q = group_log_softmax(ratios, batch)
        q = jnp.where(filled, jnp.exp(log_q), 0.0)
        prompts = jnp.sum(q)  # every prompt's q sums to one
        expect = lambda x: Mean(jnp.sum(q * x), prompts)  # noqa: E731
        divergence = Mean(policy_divergence(batch.extras["G"], ratios, batch, precision), prompts)
        terms = {name: expect(batch.extras[name]) for name in TERMS}
        terms["G"] = expect(batch.extras["G"])
        size = jnp.sum(jnp.where(filled[:, :, None] & (batch.group[:, :, None] == batch.group[:, None, :]), 1.0, 0.0), -1)
        terms["kl_habit"] = expect(log_q + jnp.log(jnp.maximum(size, 1.0)))
        terms["entropy"] = expect(-log_q)
        return Loss(divergence, {"divergence": divergence, **terms})

    return Objective(loss, prepare, responses="all", name="efe")
