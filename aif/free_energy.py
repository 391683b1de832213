"""Discrete active inference: one pure function per term, everything in nats, every sign stated.

Symbols: factors f, modalities m; likelihood `A[m]` = P(o_m | s) of shape [O_m, S_f1, S_f2, ...] over the factors named
by `dependencies[m]`; log-preferences `C[m]` = ln P(o_m | C) of shape [O_m]; beliefs `qs[f]` of shape [S_f]; predicted
outcomes `qo[m]` of shape [O_m]. Lists run over modalities or factors, as in pymdp. All functions can be jitted, mapped
and differentiated; exact zeros in a distribution count nothing and give finite gradients.

Sources: Friston et al. 2017 (Active inference: a process theory); Da Costa et al. 2020 (Active inference on discrete
state-spaces: a synthesis); Parr, Pezzulo & Friston 2022, chapters 2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import digamma
from jaxtyping import Float

from aif.errors import BadInput

TOLERANCE = 1e-4  # how far a column of probabilities may be from one
Arrays = Sequence[Array]
Dependencies = Sequence[Sequence[int]]
Actions = Sequence[Array | int] | Array  # one per factor


def _safe_log(x: Array) -> Array:
    return jnp.log(jnp.where(x > 0, x, 1.0))


def entropy(p: Float[Array, "O *rest"]) -> Float[Array, "*rest"]:
    """H[p] = - sum_o p ln p over the first axis, nats, >= 0."""
    return -jnp.sum(p * _safe_log(p), axis=0)


def _expect(x: Array, qs: Arrays, factors: Sequence[int]) -> Array:
    """Contract the trailing axes of x with the beliefs of the named factors."""
    for factor in reversed(factors):
        x = x @ qs[factor]
    return x


def expected_outcomes(A: Arrays, qs: Arrays, dependencies: Dependencies) -> list[Array]:
    """Q(o_m) = sum_s P(o_m | s) Q(s): predicted outcomes, one distribution `[O_m]` per modality."""
    return [_expect(a, qs, factors) for a, factors in zip(A, dependencies, strict=True)]


def pragmatic_value(qo: Arrays, C: Arrays) -> Float[Array, ""]:
    """U = sum_m sum_o Q(o_m) ln P(o_m | C): expected utility in nats; maximised (it enters G with a minus)."""
    return sum((jnp.sum(q * c) for q, c in zip(qo, C, strict=True)), jnp.zeros(()))


def ambiguity(A: Arrays, qs: Arrays, dependencies: Dependencies) -> Float[Array, ""]:
    """sum_m E_Q(s) H[P(o_m | s)]: expected uncertainty of outcomes given states, nats, >= 0; minimised."""
    terms = [_expect(entropy(a), qs, factors) for a, factors in zip(A, dependencies, strict=True)]
    return sum(terms, jnp.zeros(()))


def state_information_gain(A: Arrays, qs: Arrays, qo: Arrays, dependencies: Dependencies) -> Float[Array, ""]:
    """I_s = sum_m { H[Q(o_m)] - E_Q(s) H[P(o_m | s)] }: salience, nats, >= 0; maximised."""
    return sum((entropy(q) for q in qo), jnp.zeros(())) - ambiguity(A, qs, dependencies)


def dirichlet_information_gain(pA: Arrays, qs: Arrays, qo: Arrays, dependencies: Dependencies) -> Float[Array, ""]:
    """I_p = sum_m Q(o_m)^T W_m Q(s): novelty, nats, >= 0; maximised.

        W = ln a_0 - ln a + psi(a + 1) - psi(a_0 + 1)

    with a the Dirichlet counts of P(o_m | s) and a_0 their sum over outcomes; 0 where a = 0. Given the state it is
    the mutual information of outcome and parameters (Da Costa et al. 2020, eq. D.15, with the sign of a gain); for
    large counts it tends to (1/a - 1/a_0) / 2, the older approximation.
    """
    total = jnp.zeros(())
    for counts, q, factors in zip(pA, qo, dependencies, strict=True):
        known = counts > 0
        a = jnp.where(known, counts, 1.0)
        column = jnp.sum(counts, axis=0)
        a_0 = jnp.where(column > 0, column, 1.0)
        scarce = jnp.log(a_0) - jnp.log(a) + digamma(a + 1) - digamma(a_0 + 1)
        total = total + q @ _expect(jnp.where(known, scarce, 0.0), qs, factors)
    return total


def ensemble_information_gain(qo_members: Sequence[Float[Array, "E O"]]) -> Float[Array, ""]:
    """I_p = sum_m { H[mean_e Q_e(o_m)] - mean_e H[Q_e(o_m)] }: disagreement of E readers, nats, >= 0; maximised."""
    gains = [entropy(q.mean(axis=0)) - jnp.mean(jax.vmap(entropy)(q)) for q in qo_members]
    return sum(gains, jnp.zeros(()))


def risk(qo: Arrays, C: Arrays) -> Float[Array, ""]:
    """sum_m KL[Q(o_m) || P(o_m | C)], nats; minimised. Each C must be normalised (logsumexp = 0)."""
    return sum((jnp.sum(q * (_safe_log(q) - c)) for q, c in zip(qo, C, strict=True)), jnp.zeros(()))


def propagate(qs: Arrays, B: Arrays, u: Actions) -> list[Array]:
    """Q(s'_f) = B_f(u_f) Q(s_f) with `B[f]` of shape [S_f, S_f, U_f]: beliefs one step on under the actions u."""
    return [jnp.take(b, action, axis=-1) @ q for b, q, action in zip(B, qs, u, strict=True)]


def expected_free_energy(
    A: Arrays,
    C: Arrays,
    qs: Arrays,
    dependencies: Dependencies,
    *,
    B: Arrays | None = None,
    policy: Sequence[Actions] = (),
    pA: Arrays | None = None,
    state_weight: float = 1.0,
    parameter_weight: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """G = sum_t -( U + w_s I_s + w_p I_p ); minimised.

    Args:
      policy: actions `[horizon][factor]`; beliefs move by B before each evaluation. Empty: `qs` is evaluated as it is.
      pA: Dirichlet counts for the parameter information gain; without them I_p = 0.

    Returns:
      G and its terms `pragmatic`, `state_gain`, `parameter_gain`, `ambiguity`, each summed over the horizon, in nats.
    """
    steps = []
    for actions in policy or ((),):
        if B is not None and len(actions):
            qs = propagate(qs, B, actions)
        steps.append(expected_free_energy_terms(A, C, qs, dependencies, pA=pA))
    terms = {name: sum((s[name] for s in steps), jnp.zeros(())) for name in steps[0]}
    G = -(terms["pragmatic"] + state_weight * terms["state_gain"] + parameter_weight * terms["parameter_gain"])
    return G, terms


def expected_free_energy_terms(
    A: Arrays, C: Arrays, qs: Arrays, dependencies: Dependencies, *, pA: Arrays | None = None
) -> dict[str, Array]:
    """The terms of G at one time step."""
    qo = expected_outcomes(A, qs, dependencies)
    novelty = jnp.zeros(()) if pA is None else dirichlet_information_gain(pA, qs, qo, dependencies)
    return {
        "pragmatic": pragmatic_value(qo, C),
        "state_gain": state_information_gain(A, qs, qo, dependencies),
        "parameter_gain": novelty,
        "ambiguity": ambiguity(A, qs, dependencies),
    }


def check_model(
    A: Sequence[Any], C: Sequence[Any], qs: Sequence[Any], dependencies: Dependencies, *, where: str = "model"
) -> None:
    """Refuse a model that is none, before anything is computed from it.

    Raises:
      BadInput: shapes that do not fit, a likelihood or belief that does not sum to one, log-preferences of the wrong
        length or without a finite entry.
    """
    if not len(A) == len(C) == len(dependencies):
        raise BadInput(
            f"{where}: {len(A)} likelihoods, {len(C)} preferences, {len(dependencies)} dependencies; one each"
        )
    for f, q in enumerate(map(np.asarray, qs)):
        if q.ndim != 1 or (q < 0).any() or abs(q.sum() - 1) > TOLERANCE:
            raise BadInput(f"{where}: qs[{f}] is no distribution (it sums to {q.sum():.4g}); normalise it")
    for m, (a, c, factors) in enumerate(zip(map(np.asarray, A), map(np.asarray, C), dependencies, strict=True)):
        states = tuple(len(qs[f]) for f in factors)
        if a.shape[1:] != states:
            raise BadInput(f"{where}: A[{m}] has states {a.shape[1:]}, its factors {list(factors)} have {states}")
        sums = a.sum(axis=0)
        wrong = np.argwhere((np.abs(sums - 1) > TOLERANCE) | (a < 0).any(axis=0) | ~np.isfinite(sums))
        if len(wrong):
            column = tuple(int(i) for i in wrong[0])
            raise BadInput(f"{where}: A[{m}] column {column} sums to {sums[column]:.4g}, not to 1; normalise it")
        if c.shape != a.shape[:1]:
            raise BadInput(f"{where}: C[{m}] has shape {c.shape} for {len(a)} outcomes; give one number each")
        if np.isnan(c).any() or (c == np.inf).any() or not np.isfinite(c).any():
            raise BadInput(f"{where}: C[{m}] cannot be normalised; log-preferences are numbers, at least one finite")


def policy_posterior(G: Float[Array, "P"], log_E: Float[Array, "P"], precision: float | Array) -> Float[Array, "P"]:
    """Q*(pi) = softmax( ln E(pi) - precision G(pi) ). G counts from its minimum: large precisions stay finite."""
    return jax.nn.softmax(log_E - precision * (G - jnp.min(G)))


def policy_free_energy(
    q: Float[Array, "P"], G: Float[Array, "P"], log_E: Float[Array, "P"], precision: float | Array
) -> Float[Array, ""]:
    """F[q] = sum_pi q (ln q - ln E + precision G), nats; minimised by the policy posterior."""
    return jnp.sum(q * (_safe_log(q) - log_E + precision * G))


def dirichlet_mean_log(counts: Float[Array, "O *states"]) -> Float[Array, "O *states"]:
    """E[ln A] = digamma(a) - digamma(a_0) under a Dirichlet posterior, nats."""
    return digamma(counts) - digamma(jnp.sum(counts, axis=0))
