"""Expected free energy of responses: the one place where U, I_s, I_p and G of a response are computed.

    G(y) = -( U + w_s I_s + w_p I_p ),   minimised

An `Evaluation` turns a batch into the terms of every response slot. The usual one reads beliefs over the scale's
dimensions with a state reader; a generative model of one's own (a maze, say) is another function of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from aif import free_energy
from aif.objectives.logprobs import response_sums, score_hidden
from aif.policy import Policy
from aif.readers import Answer, Reader, Reading
from aif.types import Batch, Scalar, Tap, as_partial

TERMS = ("pragmatic", "state_gain", "parameter_gain")
Terms = dict[str, Array]  # the names above -> [B, R], nats


@dataclass(frozen=True)
class Evaluation:
    """How responses are evaluated: `evaluate(taps, batch) -> Terms`, and what it needs to see (see `Reader`)."""

    evaluate: Partial
    watch: Callable[[Batch], Tap] | None = None
    annotate: Callable[[Sequence[Answer]], dict[str, np.ndarray]] | None = None


def by_reader(reader: Reader, C: Float[Array, "S O"]) -> Evaluation:
    """Beliefs from a state reader against log-preferences C (nats, normalised per dimension)."""
    return Evaluation(Partial(_evaluate, read=as_partial(reader.read), C=C), reader.watch, reader.annotate)


def _evaluate(taps: Any, batch: Batch, *, read: Partial, C: Array) -> Terms:
    return terms_of(read(taps, batch), C)


def terms_of(reading: Reading, C: Float[Array, "S O"]) -> Terms:
    """U, I_s and I_p of every response, summed over the dimensions the reader knows.

    I_p is the disagreement of an ensemble's members about outcomes where the reader is one, else the Dirichlet novelty.
    """

    def one(qs: Array, A: Array, pA: Array, C: Array) -> Terms:
        return free_energy.expected_free_energy_terms([A], [C], [qs], [[0]], pA=[pA])

    dimensions = jax.vmap(one)
    terms = jax.vmap(jax.vmap(lambda qs: dimensions(qs, reading.A, reading.pA, C)))(reading.states)
    if reading.members is not None:
        outcomes = jnp.einsum("sop,ebrsp->brseo", reading.A, reading.members)
        gain = lambda q: free_energy.ensemble_information_gain([q])  # noqa: E731
        terms["parameter_gain"] = jax.vmap(jax.vmap(jax.vmap(gain)))(outcomes)
    return {name: jnp.sum(terms[name] * reading.known, axis=-1) for name in TERMS}


def observed(
    reference: Policy,
    batch: Batch,
    *,
    evaluate: Partial,
    watch: Partial | None,
    state_weight: Scalar,
    parameter_weight: Scalar,
) -> tuple[dict[str, Array], Array | None]:
    """(G and its terms per response, the reference's normed residual): one forward pass of the reference at most.

    The pass is saved, and the residual None, where nothing is watched and the reference log-probabilities are known.
    """
    hidden, taps = None, None
    if watch is not None or "reference_logps" not in batch.extras:
        hidden, taps, _ = reference(batch, tap=None if watch is None else watch(batch))
    terms = evaluate(taps, batch)
    G = -(terms["pragmatic"] + state_weight * terms["state_gain"] + parameter_weight * terms["parameter_gain"])
    return {"G": G, **terms}, hidden


def habit(reference: Policy, batch: Batch, hidden: Array | None) -> Float[Array, "B R"]:
    """ln E(y | x): the reference's log-probability of each response, from its residual or from what is known."""
    if hidden is None:
        return batch.extras["reference_logps"]
    return response_sums(score_hidden(hidden, reference.head, batch), batch)
