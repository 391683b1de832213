"""Free energy against pymdp, on random models: 12 structures, 20 draws of their numbers each.

1-3 factors, 1-4 modalities that depend on one to three of them, horizons 1-4; likelihoods are dense, sparse (exact
zeros) or deterministic, beliefs may be certain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif import free_energy as fe

pytest.importorskip("pymdp")
from pymdp import control  # noqa: E402

STRUCTURES, DRAWS = 12, 20


def simplex(rng, shape, kind):
    """Distributions over the first axis."""
    if kind == "deterministic":
        return np.moveaxis(np.eye(shape[0])[rng.integers(shape[0], size=shape[1:])], -1, 0)
    x = rng.gamma(0.7, size=shape) * (rng.random(shape) >= (0.5 if kind == "sparse" else 0.0))
    x[0] += 1e-3 * (x.sum(axis=0) == 0)
    return x / x.sum(axis=0)


class Structure:
    """Numbers of states, outcomes and actions, who depends on what, and the horizon."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        F, M = 1 + seed % 3, 1 + seed % 4
        self.states, self.actions = rng.integers(2, 5, F), rng.integers(1, 4, F)
        self.outcomes, self.horizon = rng.integers(2, 6, M), 1 + seed // 3 % 4
        sizes = [F if m == 0 else int(rng.integers(1, F + 1)) for m in range(M)]
        self.dependencies = [sorted(rng.choice(F, size, replace=False).tolist()) for size in sizes]

    def draw(self, rng, kind):
        shapes = [(o, *self.states[d]) for o, d in zip(self.outcomes, self.dependencies, strict=True)]
        return {
            "A": [simplex(rng, s, kind) for s in shapes],
            "B": [simplex(rng, (n, n, u), kind) for n, u in zip(self.states, self.actions, strict=True)],
            "C": [rng.normal(size=o) for o in self.outcomes],
            "qs": [simplex(rng, (n,), kind) for n in self.states],
            "pA": [rng.gamma(2.0, size=s) + 0.1 for s in shapes],
            "policy": rng.integers(self.actions, size=(self.horizon, len(self.actions))),
        }


@pytest.mark.parametrize("seed", range(STRUCTURES))
def test_every_term_agrees(seed):
    structure = Structure(seed)
    rng = np.random.default_rng([seed, 1])
    kinds = ["dense", "sparse", "deterministic"]
    drawn = [structure.draw(rng, kinds[k % 3]) for k in range(DRAWS)]
    models = jax.tree.map(
        lambda *x: jnp.asarray(np.stack(x), jnp.int32 if x[0].dtype.kind == "i" else jnp.float32), *drawn
    )
    deps, ones = structure.dependencies, [[f] for f in range(len(structure.states))]

    def ours(m):
        qo = fe.expected_outcomes(m["A"], m["qs"], deps)
        options = {"B": m["B"], "policy": list(m["policy"]), "pA": m["pA"], "parameter_weight": 1.0}
        return {
            "qo": qo,
            "utility": fe.pragmatic_value(qo, m["C"]),
            "states": fe.state_information_gain(m["A"], m["qs"], qo, deps),
            "novelty": fe.dirichlet_information_gain(m["pA"], m["qs"], qo, deps),
            "next": fe.propagate(m["qs"], m["B"], list(m["policy"][0])),
            "G": fe.expected_free_energy(m["A"], m["C"], m["qs"], deps, **options)[0],
        }

    def theirs(m):
        qo = control.compute_expected_obs(m["qs"], m["A"], deps)
        fixed = (m["qs"], m["A"], m["B"], m["C"], m["pA"], None, deps, ones)
        return {
            "qo": qo,
            "utility": control.compute_expected_utility(qo, m["C"]),
            "states": control.compute_info_gain(m["qs"], qo, m["A"], deps),
            "novelty": -control.calc_negative_pA_info_gain(m["pA"], qo, m["qs"], deps),
            "next": control.compute_expected_state(m["qs"], m["B"], m["policy"][0]),
            "G": -control.compute_neg_efe_policy(*fixed, m["policy"], use_param_info_gain=True),
        }

    got, want = jax.jit(jax.vmap(ours))(models), jax.jit(jax.vmap(theirs))(models)
    for name in want:
        for x, y in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(x, np.reshape(y, x.shape), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("precision", [0.0, 1.0, 16.0])
def test_the_policy_posterior_agrees(precision):
    """All policies of horizon 2 of a model with two factors, with a habit that is not uniform."""
    structure = Structure(4)
    structure.horizon = 2
    rng = np.random.default_rng(9)
    m = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), structure.draw(rng, "dense"))
    policies = jnp.asarray(rng.integers(structure.actions, size=(7, 2, len(structure.actions))))
    E = jnp.asarray(rng.dirichlet(np.ones(7)), jnp.float32)
    deps, ones = structure.dependencies, [[f] for f in range(len(structure.states))]
    want, negative = control.update_posterior_policies(
        policies, m["qs"], m["A"], m["B"], m["C"], E, None, None, deps, ones, gamma=precision
    )
    score = lambda p: fe.expected_free_energy(m["A"], m["C"], m["qs"], deps, B=m["B"], policy=list(p))[0]  # noqa: E731
    G = jax.vmap(score)(policies)
    np.testing.assert_allclose(G, -negative, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fe.policy_posterior(G, jnp.log(E), precision), want, rtol=1e-4, atol=1e-5)
