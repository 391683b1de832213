"""Discrete active inference: identities, bounds, hand values, gradients at the edge of the simplex."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif import free_energy as fe
from aif.errors import BadInput

DEPENDENCIES = [[0], [0, 1], [1, 2]]
STATES, OUTCOMES, ACTIONS = [2, 3, 4], [3, 2, 4], [2, 1, 3]
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def simplex(rng, *shape, zeros=0.0):
    """Distributions over the first axis; a share of the entries is exactly 0."""
    x = rng.gamma(0.7, size=shape) * (rng.random(shape) >= zeros)
    x[0] += 1e-3 * (x.sum(axis=0) == 0)
    return x / x.sum(axis=0)


def model(seed, zeros=0.0):
    """Three factors, three modalities of which two depend on two factors, as float64 arrays."""
    rng = np.random.default_rng(seed)
    qs = [simplex(rng, n, zeros=zeros) for n in STATES]
    A = [simplex(rng, o, *(STATES[f] for f in d), zeros=zeros) for o, d in zip(OUTCOMES, DEPENDENCIES, strict=True)]
    C = [np.log(simplex(rng, o)) for o in OUTCOMES]
    B = [simplex(rng, n, n, u) for n, u in zip(STATES, ACTIONS, strict=True)]
    return A, C, qs, B


def arrays(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def plain_entropy(p):
    return -sum(x * np.log(x) for x in np.ravel(p) if x > 0)


def joint(qs, factors):
    out = np.ones(())
    for f in factors:
        out = np.multiply.outer(out, qs[f])
    return out


def plain_terms(A, C, qs):
    """U, I_s and ambiguity by sums over every joint state."""
    U = ambiguity = spread = 0.0
    for a, c, d in zip(A, C, DEPENDENCIES, strict=True):
        p = joint(qs, d)
        qo = np.zeros(len(a))
        for s in np.ndindex(p.shape):
            qo += a[(slice(None), *s)] * p[s]
            ambiguity += p[s] * plain_entropy(a[(slice(None), *s)])
        U += (qo * c).sum()
        spread += plain_entropy(qo)
    return U, spread - ambiguity, ambiguity


@given(seeds, st.sampled_from([0.0, 0.4]))
@few
def test_terms_are_the_sums_over_joint_states(seed, zeros):
    A, C, qs, _ = model(seed, zeros)
    _, terms = fe.expected_free_energy(*arrays((A, C, qs)), DEPENDENCIES)
    U, gain, ambiguity = plain_terms(A, C, qs)
    np.testing.assert_allclose(terms["pragmatic"], U, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(terms["state_gain"], gain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(terms["ambiguity"], ambiguity, rtol=1e-5, atol=1e-5)
    assert float(terms["parameter_gain"]) == 0.0


@given(seeds)
@few
def test_G_is_risk_plus_ambiguity(seed):
    """With w_s = 1, w_p = 0 and normalised C: -(U + I_s) = sum KL[Q(o) || P(o|C)] + sum E_Q(s) H[P(o|s)]."""
    A, C, qs, _ = arrays(model(seed, 0.3))
    G, _ = fe.expected_free_energy(A, C, qs, DEPENDENCIES)
    qo = fe.expected_outcomes(A, qs, DEPENDENCIES)
    np.testing.assert_allclose(G, fe.risk(qo, C) + fe.ambiguity(A, qs, DEPENDENCIES), rtol=1e-5, atol=1e-5)
    assert float(fe.risk(qo, C)) >= -1e-6


@given(seeds, st.sampled_from([0.0, 0.4]))
@few
def test_information_gain_lies_between_zero_and_the_entropy(seed, zeros):
    """0 <= I_s <= sum_m H[Q(o_m)], and for one modality I_s <= H[Q(s)] too: it is a mutual information."""
    A, _, qs, _ = arrays(model(seed, zeros))
    qo = fe.expected_outcomes(A, qs, DEPENDENCIES)
    gain = float(fe.state_information_gain(A, qs, qo, DEPENDENCIES))
    assert -1e-6 <= gain <= sum(float(fe.entropy(q)) for q in qo) + 1e-6
    for q in qo:
        np.testing.assert_allclose(q.sum(), 1.0, rtol=1e-5)
    one = float(fe.state_information_gain(A[:1], qs, qo[:1], DEPENDENCIES[:1]))
    assert -1e-6 <= one <= float(fe.entropy(qs[0])) + 1e-6


def test_information_gain_at_both_ends():
    """A likelihood that names the state is worth H[Q(s)] = ln 2; one that ignores it is worth nothing."""
    qs = [jnp.array([0.5, 0.5])]
    for A, want in ((jnp.eye(2), np.log(2)), (jnp.full((2, 2), 0.5), 0.0)):
        qo = fe.expected_outcomes([A], qs, [[0]])
        np.testing.assert_allclose(fe.state_information_gain([A], qs, qo, [[0]]), want, atol=1e-6)


def test_entropy_by_hand():
    np.testing.assert_allclose(fe.entropy(jnp.array([0.5, 0.25, 0.25, 0.0])), 1.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(fe.entropy(jnp.array([[1.0, 0.5], [0.0, 0.5]])), [0.0, np.log(2)], atol=1e-7)


def test_novelty_by_hand():
    """a = [[1, 4], [3, 0]], Q(s) = (1/2, 1/2), Q(o) = (5/8, 3/8); columns sum to 4.

    W = ln a_0/a + psi(a + 1) - psi(a_0 + 1): [[ln 4 - 13/12, 0], [ln 4/3 - 1/4, 0 where a = 0]].
    """
    pA, qs = [jnp.array([[1.0, 4.0], [3.0, 0.0]])], [jnp.array([0.5, 0.5])]
    qo = fe.expected_outcomes([pA[0] / 4], qs, [[0]])
    np.testing.assert_allclose(qo[0], [5 / 8, 3 / 8], rtol=1e-6)
    want = (5 / 8 * (np.log(4) - 13 / 12) + 3 / 8 * (np.log(4 / 3) - 1 / 4)) / 2
    np.testing.assert_allclose(fe.dirichlet_information_gain(pA, qs, qo, [[0]]), want, rtol=1e-5)


def test_novelty_falls_with_evidence():
    """Less is left to learn; with many counts the gain is that of the older approximation, (1/a - 1/a_0) / 2."""
    A, qs = jnp.array([[0.6, 0.3], [0.4, 0.7]]), [jnp.array([0.5, 0.5])]
    qo = fe.expected_outcomes([A], qs, [[0]])
    gain = lambda n: fe.dirichlet_information_gain([n * A], qs, qo, [[0]])  # noqa: E731
    assert float(gain(2.0)) > float(gain(20.0)) > float(gain(200.0)) > 0
    old = float(qo[0] @ ((1 / (200 * A) - 1 / 200) / 2) @ qs[0])
    np.testing.assert_allclose(gain(200.0), old, rtol=0.02)


def test_ensemble_gain_by_hand():
    """Two readers certain of different outcomes disagree by ln 2; two that agree by nothing, however unsure."""
    certain, unsure = jnp.eye(2), jnp.array([[0.3, 0.7], [0.3, 0.7]])
    np.testing.assert_allclose(fe.ensemble_information_gain([certain]), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(fe.ensemble_information_gain([unsure]), 0.0, atol=1e-7)
    np.testing.assert_allclose(fe.ensemble_information_gain([certain, unsure]), np.log(2), rtol=1e-6)


def test_propagate_by_hand():
    """Action 0 keeps the state, action 1 swaps it; the second factor has a column per old state."""
    B = [jnp.stack([jnp.eye(2), jnp.eye(2)[::-1]], axis=-1), jnp.array([[0.9, 0.4], [0.1, 0.6]])[..., None]]
    qs = [jnp.array([0.2, 0.8]), jnp.array([0.5, 0.5])]
    kept, swapped = fe.propagate(qs, B, [0, 0]), fe.propagate(qs, B, [1, 0])
    np.testing.assert_allclose(kept[0], [0.2, 0.8], rtol=1e-6)
    np.testing.assert_allclose(swapped[0], [0.8, 0.2], rtol=1e-6)
    np.testing.assert_allclose(kept[1], [0.65, 0.35], rtol=1e-6)


@pytest.mark.parametrize("horizon", [1, 3])
def test_G_sums_over_the_horizon(horizon):
    """Beliefs move first, then are evaluated, at every step; the weights multiply their own terms."""
    A, C, qs, B = model(5)
    rng = np.random.default_rng(horizon)
    policy = [[int(rng.integers(u)) for u in ACTIONS] for _ in range(horizon)]
    pA = [3 * a for a in A]
    weights = {"state_weight": 0.7, "parameter_weight": 0.3}
    G, terms = fe.expected_free_energy(
        *arrays((A, C, qs)), DEPENDENCIES, B=arrays(B), policy=policy, pA=arrays(pA), **weights
    )
    U = gain = 0.0
    for actions in policy:
        qs = [b[..., u] @ q for b, u, q in zip(B, actions, qs, strict=True)]
        step = plain_terms(A, C, qs)
        U, gain = U + step[0], gain + step[1]
    np.testing.assert_allclose(terms["pragmatic"], U, rtol=1e-5)
    np.testing.assert_allclose(terms["state_gain"], gain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(G, -(U + 0.7 * gain + 0.3 * terms["parameter_gain"]), rtol=1e-5)
    assert float(terms["parameter_gain"]) > 0


def test_posterior_at_both_ends_of_precision():
    """Precision 0 is the habit; a large one puts everything on the smallest G, ties shared by habit."""
    G, habit = jnp.array([2.0, 1.0, 1.0, 3.0]), jnp.array([0.1, 0.6, 0.2, 0.1])
    np.testing.assert_allclose(fe.policy_posterior(G, jnp.log(habit), 0.0), habit, rtol=1e-6)
    np.testing.assert_allclose(fe.policy_posterior(G, jnp.log(habit), 50.0), [0, 0.75, 0.25, 0], atol=1e-5)
    want = np.asarray(habit) * np.exp(-2 * np.asarray(G))
    np.testing.assert_allclose(fe.policy_posterior(G, jnp.log(habit), 2.0), want / want.sum(), rtol=1e-5)


@given(seeds, st.floats(0.0, 8.0))
@few
def test_the_posterior_minimises_the_free_energy(seed, precision):
    """F[q] - F[Q*] = KL(q || Q*) for every q, and F[Q*] = - ln sum E exp(-precision G)."""
    rng = np.random.default_rng(seed)
    G, habit, q = rng.normal(size=5), simplex(rng, 5), simplex(rng, 5, zeros=0.3)
    log_E = np.log(np.maximum(habit, 1e-12))
    args = (*arrays((G, log_E)), jnp.float32(precision))
    best = fe.policy_posterior(*args)
    F = lambda x: float(fe.policy_free_energy(jnp.asarray(x, jnp.float32), *args))  # noqa: E731
    evidence = log_E - precision * G
    log_best = evidence - np.log(np.exp(evidence - evidence.max()).sum()) - evidence.max()
    np.testing.assert_allclose(F(best), (log_best - evidence).mean(), rtol=1e-4, atol=1e-4)
    divergence = sum(x * (np.log(x) - l) for x, l in zip(q, log_best, strict=True) if x > 0)
    np.testing.assert_allclose(F(q) - F(best), divergence, rtol=1e-3, atol=2e-4)
    assert F(q) >= F(best) - 1e-4


def test_gradients_are_finite_where_probabilities_are_zero():
    """Certain beliefs, a deterministic likelihood with empty counts, and a policy with no mass on one option."""
    A, pA = jnp.eye(3), 2 * jnp.eye(3)
    C = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    qs = jnp.array([1.0, 0.0, 0.0])

    def G(A, C, qs, pA):
        return fe.expected_free_energy([A], [C], [qs], [[0]], pA=[pA], parameter_weight=1.0)[0]

    value, slopes = jax.value_and_grad(G, argnums=(0, 1, 2, 3))(A, C, qs, pA)
    np.testing.assert_allclose(value, -np.log(0.7), rtol=1e-6)
    assert all(np.isfinite(x).all() for x in slopes)
    q = jnp.array([0.5, 0.5, 0.0])
    assert np.isfinite(jax.grad(fe.policy_free_energy)(q, C, C, 1.0)).all()
    assert np.isfinite(jax.grad(lambda q: fe.risk([q], [C]))(q)).all()
    assert np.isfinite(jax.grad(lambda q: fe.ensemble_information_gain([q]))(jnp.eye(2))).all()


def test_dirichlet_mean_log_by_hand():
    """psi(1) - psi(2) = -1 for counts (1, 1); psi(2) - psi(3) = -1/2 and psi(1) - psi(3) = -3/2 for (2, 1)."""
    got = fe.dirichlet_mean_log(jnp.array([[1.0, 2.0], [1.0, 1.0]]))
    np.testing.assert_allclose(got, [[-1.0, -0.5], [-1.0, -1.5]], rtol=1e-5)


def test_jit_and_vmap():
    A, C, qs, _ = arrays(model(2))
    many = jnp.stack([qs[0], qs[0][::-1]])
    evaluate = lambda q: fe.expected_free_energy(A[:1], C[:1], [q], [[0]])[0]  # noqa: E731
    got = jax.jit(jax.vmap(evaluate))(many)
    np.testing.assert_allclose(got, [evaluate(many[0]), evaluate(many[1])], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": [np.array([[0.6, 0.3], [0.3, 0.7]])]}, r"A\[0\] column \(0,\) sums to 0.9"),
        ({"A": [np.ones((2, 3)) / 2]}, r"A\[0\] has states \(3,\), its factors \[0\] have \(2,\)"),
        ({"C": [np.zeros(3)]}, r"C\[0\] has shape \(3,\) for 2 outcomes"),
        ({"C": [np.array([0.0, np.nan])]}, "cannot be normalised"),
        ({"C": [np.array([-np.inf, -np.inf])]}, "cannot be normalised"),
        ({"C": []}, "1 likelihoods, 0 preferences"),
        ({"qs": [np.array([0.5, 0.6])]}, r"qs\[0\] is no distribution \(it sums to 1.1\)"),
    ],
)
def test_what_is_no_model_is_refused(change, message):
    right = {"A": [np.eye(2)], "C": [np.zeros(2)], "qs": [np.array([0.5, 0.5])]}
    fe.check_model(**right, dependencies=[[0]])
    with pytest.raises(BadInput, match=message):
        fe.check_model(**{**right, **change}, dependencies=[[0]])


def test_gradients_agree_with_finite_differences():
    A, C, qs, B = arrays(model(11))

    def G(x):
        moved = [jax.nn.softmax(jnp.log(q + 1e-3) + d) for q, d in zip(qs, x, strict=True)]
        options = {"B": B, "policy": [[0, 0, 1], [1, 0, 2]], "pA": [5 * a + 0.1 for a in A], "parameter_weight": 0.5}
        return fe.expected_free_energy(A, C, moved, DEPENDENCIES, **options)[0]

    jax.test_util.check_grads(
        G, ([0.1 * jnp.arange(len(q), dtype=jnp.float32) for q in qs],), order=1, modes=["rev"], atol=2e-2, rtol=2e-2
    )
