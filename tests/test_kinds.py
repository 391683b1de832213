"""Kinds of direction: paired PCA, linear probes against scikit-learn, trained vectors, what adapters write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awake

from aif.adapter import lora, steering_vector
from aif.batches import build, once
from aif.directions import (
    Activations,
    mean_difference,
    mean_shift,
    paired_pca,
    probe,
    response_means,
    trained_vector,
    written,
)
from aif.directions.activations import response_means as means_of
from aif.directions.contrast import pairs_of
from aif.directions.linear import fit_linear
from aif.directions.readable import auroc, shuffled_labels
from aif.errors import BadInput
from aif.slots import owners, pool_weights
from aif.types import Direction


def planted(n=80, D=12, L=2, gap=3.0, seed=0):
    """Two responses a prompt; layer 1 moves the positive one along the first axis, layer 0 is noise."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(n, L, D)).astype(np.float32)
    positive = np.arange(n) % 2 == 0
    means[positive, 1, 0] += gap
    prompts = np.arange(n) // 2
    return Activations(means, np.full(n, 5), np.full(L, 4.0)), positive, prompts


# Contrast


def test_pca_of_pairs_by_hand():
    """Differences (3, 0), (1, 2): the first axis of [[10, 2], [2, 4]], size sqrt(lambda_1 / 2), along both."""
    means = np.array([[3.0, 0], [0, 0], [1, 2], [0, 0]])[:, None]
    found = paired_pca(Activations(means, np.ones(4), np.ones(1)), np.array([1, 0, 1, 0], bool), np.array([0, 0, 1, 1]))
    values, vectors = np.linalg.eigh(np.array([[10.0, 2], [2, 4]]))
    want = vectors[:, 1] * np.sign(vectors[0, 1]) * np.sqrt(values[1] / 2)
    np.testing.assert_allclose(found.vector[0], want, rtol=1e-5)
    np.testing.assert_allclose(found.provenance["explained"], [values[1] / 14], rtol=1e-6)
    assert found.kind == "contrast" and found.provenance["method"] == "paired PCA" and found.provenance["pairs"] == 2


def test_pca_of_pairs_is_the_first_component_about_midpoints():
    """scikit-learn's PCA of both members of each pair about their midpoint has the same axis, either way named."""
    from sklearn.decomposition import PCA

    activations, positive, prompts = planted(gap=1.5)
    got = np.asarray(paired_pca(activations, positive, prompts).vector[1])
    pairs = activations.means[:, 1].reshape(-1, 2, 12)
    axis = PCA(n_components=1).fit((pairs - pairs.mean(axis=1, keepdims=True)).reshape(-1, 12)).components_[0]
    np.testing.assert_allclose(abs(axis @ got) / np.linalg.norm(got), 1.0, atol=1e-5)
    other = np.asarray(paired_pca(activations, ~positive, prompts).vector[1])
    np.testing.assert_allclose(other, -got, atol=1e-5)


def test_one_outlying_pair_does_not_turn_the_others():
    """Differences 1, 1, 1, -9 along one axis: their mean is negative, most of them are positive."""
    means = np.zeros((8, 1, 2))
    means[::2, 0, 0] = [1, 1, 1, -9]
    found = paired_pca(Activations(means, np.ones(8), np.ones(1)), np.arange(8) % 2 == 0, np.arange(8) // 2)
    np.testing.assert_allclose(found.vector, [[np.sqrt(84 / 4), 0.0]], atol=1e-6)


def test_pairs_join_every_two_answers_of_different_class():
    positive, prompts = np.array([1, 0, 0, 1], bool), np.array([4, 4, 4, 9])
    assert pairs_of(positive, prompts).tolist() == [[0, 1], [0, 2]]
    with pytest.raises(BadInput, match="no prompt has a response of each class"):
        pairs_of(positive, np.arange(4))


def test_the_last_token_alone(base, rows, lm):
    """Pooling `last` is the residual of each answer's end token: the mean where an answer has one token."""
    data = build(rows[:3], lm.tokenizer, which="all", length=384, target="discernment")
    last, mean = (means_of(base, data, rows=1, pool=pool) for pool in ("last", "mean"))
    assert np.abs(last.means - mean.means).max() > 0.1
    np.testing.assert_array_equal(last.tokens, mean.tokens)
    batch = jax.tree.map(jnp.asarray, next(once(data, rows=1)))
    whose, weights = np.asarray(owners(batch)), np.asarray(pool_weights(batch, "last"))
    for row, slot in np.argwhere(np.asarray(batch.ids) >= 0):
        np.testing.assert_array_equal(np.flatnonzero(weights[row, :, slot]), [np.flatnonzero(whose[row] == slot)[-1]])


# Probes


def standardised(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


@pytest.mark.parametrize("wide", [False, True], ids=["N > D", "N < D"])
@pytest.mark.parametrize("method,strength", [("logistic", 5.0), ("ridge", 3.0), ("lda", 0.3)])
def test_probes_are_scikit_learns(method, strength, wide):
    """Decision values on standardised features, with some rows weighed out, two label sets at once."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression, Ridge

    rng = np.random.default_rng(4)
    n, D = (40, 60) if wide else (90, 12)
    x = rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) + 2
    labels = np.stack([(x[:, 0] + rng.normal(size=n) > 2), rng.random(n) > 0.4], axis=1).astype(int)
    weights = (rng.random((n, 2)) > 0.2).astype(float)
    w, b = fit_linear(x, labels, weights, method=method, strength=strength)
    z = standardised(x)
    for p in range(2):
        on, y = weights[:, p] > 0, labels[:, p]
        model = {
            "logistic": LogisticRegression(C=1 / strength, max_iter=10000, tol=1e-10),
            "ridge": Ridge(alpha=strength),
            "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage=strength),
        }[method]
        model.fit(z[on], y[on] * 2 - 1 if method == "ridge" else y[on])
        want = model.predict(z) if method == "ridge" else model.decision_function(z)
        np.testing.assert_allclose(x @ w[:, p] + b[p], want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("method", ["logistic", "ridge", "lda"])
def test_a_probe_reads_the_layer_where_something_is_planted(method):
    activations, positive, prompts = planted(n=160, D=4)
    direction, (noise, signal) = probe(activations, positive, prompts, method=method, strength=None)
    assert direction.kind == "probe" and direction.provenance["layer"] == 1
    assert signal.accuracy > 0.85 and signal.auroc > 0.9 and signal.selectivity_low > 0.1 and signal.split_half > 0.5
    assert signal.low <= signal.accuracy <= signal.high and noise.selectivity_low < 0
    assert signal.accuracy - signal.control == pytest.approx(signal.selectivity)
    v = np.asarray(direction.vector[1])
    assert v[0] > np.abs(v[1:]).max()
    read = activations.means[:, 1] @ v + direction.provenance["bias"][1] > 0
    assert (read == positive).mean() >= signal.accuracy - 0.02


def test_a_probe_never_sees_the_prompt_it_is_tested_on():
    """The answers of a prompt share a random label: folds of rows would remember it, folds of prompts do not."""
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(40), 4)
    positive = np.repeat(rng.random(40) > 0.5, 4)
    means = (3 * rng.normal(size=(40, 1, 60))[prompts] + 0.1 * rng.normal(size=(160, 1, 60))).astype(np.float32)
    found = probe(Activations(means, np.ones(160), np.ones(1)), positive, prompts, strength=1.0)[1][0]
    assert found.accuracy < 0.75


def test_a_rare_class_counts_as_much_as_the_other():
    """Noise with one positive in eight: saying negative always would be right for 7/8 of the rows and scores 1/2."""
    rng = np.random.default_rng(2)
    noise = Activations(rng.normal(size=(320, 1, 4)).astype(np.float32), np.ones(320), np.ones(1))
    found = probe(noise, np.arange(320) % 8 == 0, np.arange(320) // 8, method="lda")[1][0]
    assert 0.35 < found.accuracy < 0.65 and 0.35 < found.control < 0.65


def test_shuffled_labels_keep_the_balance_of_every_prompt():
    _, positive, prompts = planted(40)
    shuffled = shuffled_labels(positive, prompts, seed=0)
    assert 0 < (shuffled != positive).sum() < 40
    assert all(shuffled[prompts == p].sum() == 1 for p in range(20))


def test_prompts_with_one_response_are_shuffled_too():
    """Each of 30 prompts has one response and 3 have two of one class: labels move between prompts of a size."""
    prompts = np.array([*range(30), 30, 30, 31, 31, 32, 32])
    positive = np.array([True] * 15 + [False] * 15 + [True, True, False, False, False, False])
    shuffled = shuffled_labels(positive, prompts, seed=0)
    assert shuffled[:30].sum() == 15 and (shuffled[:30] != positive[:30]).sum() > 4
    assert shuffled[30:].reshape(3, 2).sum(axis=1).tolist() in ([2, 0, 0], [0, 2, 0], [0, 0, 2])


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    score, positive = rng.integers(6, size=50).astype(float), rng.random(50) > 0.4
    assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score))


def test_what_cannot_be_probed_is_refused():
    activations, positive, prompts = planted(20)
    for labels in (np.ones(20, bool), np.zeros(20, bool)):
        with pytest.raises(BadInput, match="one of the two classes has no response"):
            probe(activations, labels, prompts)
    broken = activations._replace(means=activations.means * np.nan)
    for make in (lambda a: probe(a, positive, prompts), lambda a: paired_pca(a, positive, prompts)):
        with pytest.raises(BadInput, match="not finite"):
            make(broken)
    for options, message in (
        ({"layers": [2]}, "layer 2 is out of range; the model has layers 0..1"),
        ({"method": "svm"}, "no method is called 'svm'; there are logistic, ridge, lda"),
        ({"method": "lda", "strength": 2.0}, "strength 2 is out of range for lda; give 0 to 1"),
        ({"folds": 11}, "10 prompts cannot make 11 folds"),
    ):
        with pytest.raises(BadInput, match=message):
            probe(activations, positive, prompts, **options)
    with pytest.raises(BadInput, match="holds one class only"):
        probe(activations, np.arange(20) < 2, prompts)


# What training found


def test_a_trained_vector_is_scale_times_u(toy):
    adapter = awake(steering_vector(toy.config, layers=[1, 2]), jax.random.key(0))
    adapter["vector"]["u"] = adapter["vector"]["u"].at[2].multiply(5.0)
    found = trained_vector(adapter)
    np.testing.assert_allclose(found.vector[1:], adapter["vector"]["u"][1:])
    assert not found.vector[0].any() and found.kind == "trained"
    assert (found.provenance["layers"], found.provenance["layer"]) == ([1, 2], 2)
    with pytest.raises(BadInput, match="zero at every layer; train the adapter first"):
        trained_vector(steering_vector(toy.config))
    with pytest.raises(BadInput, match="holds q and no vector"):
        trained_vector({"q": {}})


def test_what_a_rank_1_adapter_writes(toy):
    """The change of the residual at the first adapted block is (x . A) times that vector."""
    from aif.models.decoder import forward

    adapter = awake(
        lora(toy.config, rank=1, alpha=2.0, targets=["down", "q"], key=jax.random.key(1)), jax.random.key(2)
    )
    found = written(adapter, "down")
    assert found.kind == "adapter" and found.provenance["sign"].startswith("none")
    only = {"down": adapter["down"]}
    run = jax.jit(lambda a: forward(toy.config, toy.params, jnp.arange(6)[None], adapter=a, tap=lambda h: h).taps[0, 0])
    moved = np.asarray(run(only) - run({"down": {**adapter["down"], "b": 0 * adapter["down"]["b"]}}))
    unit = np.asarray(found.vector[0]) / np.linalg.norm(found.vector[0])
    np.testing.assert_allclose(moved - np.outer(moved @ unit, unit), 0, atol=1e-5)
    assert np.abs(moved).max() > 1e-3
    turned = written(adapter, "down", toward=Direction(-found.vector, "contrast"))
    np.testing.assert_allclose(turned.vector, -found.vector)


def test_adapters_without_one_direction_are_refused(toy, toy_adapter):
    for target, message in (("q", "'q' does not write to the residual stream"), ("down", "down has rank 2")):
        with pytest.raises(BadInput, match=message):
            written(toy_adapter, target)
    with pytest.raises(BadInput, match="holds q and not 'o'"):
        written({"q": toy_adapter["q"]}, "o")
    rank1 = lora(toy.config, rank=1, alpha=2.0, targets=["o"], key=jax.random.key(1))
    with pytest.raises(BadInput, match="zero at every layer"):
        written(rank1, "o")


def test_the_mean_shift_is_tuned_minus_base(base, adapter, rows, lm):
    data = build(rows[:2], lm.tokenizer, which="all", length=384, target="discernment")
    before, after = (response_means(p, data, rows=1) for p in (base, base.replace(adapter=adapter)))
    found = mean_shift(before, after)
    np.testing.assert_allclose(found.vector, (after.means - before.means).mean(axis=0), atol=1e-5)
    vector = steering_vector(lm.config)
    vector["vector"]["u"] = vector["vector"]["u"].at[-1].set(0.5)
    pushed = mean_shift(before, response_means(base.replace(adapter=vector), data, rows=1))
    np.testing.assert_allclose(pushed.vector[-1], 0.5, atol=1e-4)  # a vector at the last layer is its own shift
    with pytest.raises(BadInput, match="read different texts"):
        mean_shift(before, after._replace(tokens=after.tokens + 1))
    with pytest.raises(BadInput, match="not finite"):
        mean_shift(before, after._replace(means=after.means * np.nan))


def test_kinds_differ(base, rows, lm):
    """Mean difference and probe of the same activations are not the same direction."""
    data = build(rows, lm.tokenizer, which="all", length=384, target="discernment")
    activations = response_means(base, data, rows=2)
    positive, prompts = data.tables["preference"] > 0, np.array(data.owners)[:, 0]
    mean = np.asarray(mean_difference(activations, positive).vector)
    probed = np.asarray(probe(activations, positive, prompts, method="lda", folds=4)[0].vector)
    cosine = (mean * probed).sum(axis=1) / np.linalg.norm(mean, axis=1) / np.linalg.norm(probed, axis=1)
    assert (cosine > 0).all() and (cosine < 0.95).all()
