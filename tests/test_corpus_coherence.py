"""Directional coherence: the statistic by hand, against a plain loop, and on a corpus read by a model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.batches import build, once
from aif.corpus import Candidate
from aif.directions.coherence import answered, coherence, contrasted, differences, measure, summary
from aif.errors import BadInput


def drawn(seed: int, n: int = 9, layers: int = 2, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, layers, width)).astype(np.float32)


def test_by_hand():
    """u = (1, 0), (0, 1), (0, 1), lengths apart: R = |(1, 2)| / 3; flipping the first: |(-1, 2)| / 3, the same;
    all three flipped but the last: |(-1, 0)| / 3. Domains 0, 0, 1: within cos(u1, u2) = 0; across 0 and 1, mean 1/2.
    The others' sum of the first is (0, 2): cosine 0; of the second (1, 1): 1 / sqrt 2."""
    v = jnp.array([[[3.0, 0]], [[0, 0.1]], [[0, 7]]])
    signs = jnp.array([[1.0, 1, 1], [-1, 1, 1], [-1, -1, 1]])
    found = coherence(v, jnp.array([0, 0, 1]), signs)
    np.testing.assert_allclose(found.resultant, [5**0.5 / 3], rtol=1e-6)
    np.testing.assert_allclose(found.null[:, 0], [5**0.5 / 3, 5**0.5 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose([found.within[0], found.across[0]], [0.0, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.own[:, 0], [0.0, 0.5**0.5, 0.5**0.5], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop_over_pairs(seed):
    v, domains = drawn(seed), np.array([0, 1, 2, 0, 1, 2, 0, 1, 1])
    found = coherence(jnp.asarray(v), jnp.asarray(domains), jnp.ones((1, 9)))
    u = v / np.linalg.norm(v, axis=-1, keepdims=True)
    for layer in range(2):
        cosines = {(i, j): u[i, layer] @ u[j, layer] for i, j in combinations(range(9), 2)}
        inside = [c for (i, j), c in cosines.items() if domains[i] == domains[j]]
        outside = [c for (i, j), c in cosines.items() if domains[i] != domains[j]]
        np.testing.assert_allclose(found.within[layer], np.mean(inside), atol=1e-5)
        np.testing.assert_allclose(found.across[layer], np.mean(outside), atol=1e-5)
        for i in range(9):
            rest = np.delete(u[:, layer], i, axis=0).mean(axis=0)
            np.testing.assert_allclose(found.own[i, layer], u[i, layer] @ rest / np.linalg.norm(rest), atol=1e-5)
    np.testing.assert_allclose(found.null[0], found.resultant, rtol=1e-5)  # no flip at all


def test_lengths_and_a_common_sign_do_not_matter():
    v, domains, signs = drawn(1), jnp.zeros(9, int), jnp.asarray(np.sign(drawn(2)[:, 0, :1].T))
    longer = v * np.exp(drawn(3)[:, :1, :1])
    for other in (longer, -v):
        for a, b in zip(
            coherence(jnp.asarray(v), domains, signs), coherence(jnp.asarray(other), domains, signs), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_parallel_differences_are_coherent_and_unrelated_ones_are_not(rows):
    many = [replace(rows[0], domain=str(k % 4)) for k in range(60)]
    noise = drawn(4, 60, 3, 64)
    along = summary(measure(noise + 2.0, many, flips=99), many)
    apart = summary(measure(noise, many, flips=99), many)
    assert all(l["R"] > 0.85 and l["p"] == 0.01 for l in along["layers"])
    assert all(l["R"] < 0.2 and l["p"] > 0.01 for l in apart["layers"])
    assert abs(apart["layers"][0]["null_mean"] - 60**-0.5) < 0.02


def test_a_row_that_points_elsewhere_is_an_outlier(rows):
    many = [replace(rows[0], id=f"r{k}") for k in range(40)]
    v = 0.3 * drawn(5, 40, 1, 32) + 1.0
    v[17] *= -1
    found = summary(measure(v, many, flips=19), many)
    assert [o["id"] for o in found["outliers"]] == ["r17"] and found["outliers"][0]["cosine"] < -0.8
    assert found["layers"][0]["cosine_across_domains"] is None  # one domain only
    json.dumps(found, allow_nan=False)


def test_differences_are_means_over_the_answers_tokens(lm, base, rows):
    """Target minus the mean of the other three, from the residuals of one row at a time."""
    v = differences(base, lm.tokenizer, rows[:3], target="discernment")
    for number, row in enumerate(rows[:3]):
        data = build([row], lm.tokenizer, which="all", length=384, target="discernment")
        (batch,) = once(data, rows=1)
        residual = np.asarray(jax.jit(lambda p, b: p(b, tap=lambda h: h).taps)(base, batch))[:, 0]  # [L, T, D]
        mean = [residual[:, np.asarray(batch.branches[0]) == k].mean(axis=1) for k in range(1, 5)]
        np.testing.assert_allclose(v[number], mean[0] - np.mean(mean[1:], axis=0), atol=1e-4)


def test_contrasts(rows):
    one = contrasted(rows, "discernment", "control")
    assert [[c.stance for c in r.candidates] for r in one] == [["discernment", "control"]] * 8
    assert all(len(r.candidates) == 4 for r in contrasted(rows, "discernment", "others"))
    with pytest.raises(
        BadInput, match="no row has an answer of stance 'discernment' and a contrast 'contrl'; the stances"
    ):
        contrasted(rows, "discernment", "contrl")
    plain = [replace(rows[0], candidates=(Candidate("a"), Candidate("b")))]
    with pytest.raises(BadInput, match="'discernment'"):
        contrasted(plain, "discernment", "others")


def test_the_models_own_answers_are_a_contrast(lm, base, rows):
    alone = [replace(r, candidates=(Candidate("So it is."),), train_turns=True) for r in rows[:2]]
    found = answered(base, lm.tokenizer, alone, target="discernment", tokens=4)
    assert [c.stance for r in found for c in r.candidates] == ["", "base"] * len(found) and found
    assert differences(base, lm.tokenizer, found, target="discernment").shape == (len(found), 2, 64)
