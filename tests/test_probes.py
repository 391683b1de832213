"""The probe bank: fits against scikit-learn, grouped folds, what is reported, and the reader made of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.batches import build, once
from aif.directions.activations import response_means as means_of
from aif.directions.logistic import fit
from aif.directions.probes import (
    Rated,
    basis_of,
    calibration_error,
    confusion,
    fit_bank,
    folds_of,
    held_out,
    load_bank,
    save_bank,
    score,
)
from aif.errors import BadInput
from aif.objectives.efe import efe
from aif.readers.probes import probes

LEVELS = 3


def rated(n=48, D=20, layers=3, seed=0):
    """Level of dimension 0 follows the first coordinate of layer 1; dimension 1 is noise; dimension 2 is constant."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(n, layers, D)).astype(np.float32)
    signal = np.digitize(means[:, 1, 0], [-0.5, 0.5])
    levels = np.stack([signal, rng.integers(LEVELS, size=n), np.full(n, 2)], axis=1)
    return Rated(means, levels, np.repeat(np.arange(n // 4), 4))


@pytest.fixture(scope="module")
def bank():
    return fit_bank(rated(160), ("signal", "noise", "constant"), LEVELS, layers=[0, 1, 2], members=4, penalties=[3.0])


@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_the_fit_is_scikit_learns(penalty):
    """C = 1 / penalty, on standardised features, weights included: probabilities within 1e-3."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 90)) @ rng.normal(size=(90, 90))  # more features than rows
    y = rng.integers(LEVELS, size=(60, 2))
    w = rng.integers(1, 4, size=(60, 2)).astype(np.float32)
    basis = basis_of(x)
    z = basis.of(x).astype(np.float32)
    B, b = fit(z, y, w, penalty, levels=LEVELS)
    got = np.asarray(jax.nn.softmax(jnp.einsum("nr,rpo->npo", z, B) + b, axis=-1))
    for p in range(2):
        model = LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)
        model.fit((x - basis.mean) / basis.scale, y[:, p], sample_weight=w[:, p])
        np.testing.assert_allclose(got[:, p], model.predict_proba((x - basis.mean) / basis.scale), atol=1e-3)


def test_a_label_that_is_missing_is_as_if_dropped():
    data = rated()
    z = basis_of(data.means[:, 1]).of(data.means[:, 1]).astype(np.float32)
    gone = data.levels[:, :1].astype(np.int32)
    gone[:7] = -1
    ones = np.ones(gone.shape, np.float32)
    with_gap = fit(z, gone, ones, 3.0, levels=LEVELS)
    dropped = fit(z[7:], gone[7:], ones[7:], 3.0, levels=LEVELS)
    for x, y in zip(with_gap, dropped, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-2 * float(np.abs(y).max()))


def test_folds_never_split_a_prompt():
    data = rated()
    fold = folds_of(data.prompts, 5, seed=1)
    assert all(len(set(fold[data.prompts == p])) == 1 for p in set(data.prompts))
    assert set(fold) == set(range(5))
    with pytest.raises(BadInput, match="2 prompts cannot make 5 folds"):
        folds_of(np.array([0, 0, 1]), 5, seed=0)


def test_the_order_of_rows_does_not_matter():
    data = rated()
    fold = folds_of(data.prompts, 4, seed=0)
    order = np.random.default_rng(2).permutation(len(fold))
    p = held_out(data.means[:, 1], data.levels, fold, [3.0], LEVELS)[0]
    q = held_out(data.means[order, 1], data.levels[order], fold[order], [3.0], LEVELS)[0]
    np.testing.assert_allclose(p[order], q, atol=1e-3)


def test_the_bank_finds_the_layer_and_says_what_it_knows(bank):
    signal, noise, constant = bank.report
    assert bank.layer == 1
    assert signal["accuracy"] > 0.75 and signal["kappa"] > 0.7 and signal["shuffled"] < 0.6
    assert noise["accuracy"] < 0.55 and constant["majority"] == 1.0
    np.testing.assert_array_equal(bank.usable, [1, 1, 0])
    np.testing.assert_allclose(bank.A.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(bank.A[0].argmax(axis=0), [0, 1, 2])  # [outcome, state]
    np.testing.assert_allclose(bank.pA / bank.pA.sum(axis=1, keepdims=True), bank.A, rtol=1e-5)


def test_scores_by_hand():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    y = np.array([0, 1, 1, -1])
    got = score(p, y)
    assert (got["n"], got["accuracy"], got["chance"], got["majority"]) == (3, 2 / 3, 0.5, 2 / 3)
    want = (abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.6)) / 3  # one reading a bin
    np.testing.assert_allclose(calibration_error(p[:3].max(axis=1), np.array([True, False, True])), want)
    np.testing.assert_array_equal(confusion(p[:, None], y[:, None])[0], [[1, 1], [0, 1]])


def test_the_reader_reads_what_the_bank_says(lm, base, rows, bank):
    """The state is the mean of the members; heads on raw means give the same; a constant dimension is unknown."""
    data = build(rows, lm.tokenizer, which="all", length=384, target="discernment", dimensions=["a", "b", "c"])
    means = means_of(base, data, rows=2).means
    rng = np.random.default_rng(0)
    levels = rng.integers(LEVELS, size=(len(means), 3))
    levels[:, 2] = 1
    owned = fit_bank(
        Rated(means, levels, np.array(data.owners)[:, 0]), "abc", LEVELS, members=3, penalties=[10.0], folds=4
    )
    objective = efe(probes(owned), jnp.zeros((3, LEVELS)) - jnp.log(LEVELS), parameter_weight=1.0)
    batch = jax.tree.map(jnp.asarray, next(once(data, rows=2)))
    taps = base(batch, tap=probes(owned).watch(batch)).taps
    reading = probes(owned).read(taps, batch)
    np.testing.assert_allclose(reading.states, reading.members.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(reading.states.sum(axis=-1), 1.0, rtol=1e-5)
    filled = np.asarray(batch.ids >= 0)
    np.testing.assert_array_equal(np.asarray(reading.known), filled[..., None] * np.array([1.0, 1.0, 0.0]))
    x = means[np.asarray(batch.ids)[filled], owned.layer]
    want = jax.nn.softmax(jnp.einsum("nd,esdo->enso", x, owned.weights) + owned.bias[:, None], axis=-1).mean(axis=0)
    np.testing.assert_allclose(np.asarray(reading.states)[filled], want, atol=1e-4)
    facts = jax.jit(objective.prepare)(base, batch, jax.random.key(0))
    assert np.isfinite(facts["G"]).all() and (np.asarray(facts["parameter_gain"])[filled] >= -1e-5).all()
    np.testing.assert_allclose(
        facts["G"], -(facts["pragmatic"] + facts["state_gain"] + facts["parameter_gain"]), rtol=1e-4
    )


def test_a_bank_is_kept_and_refuses_another_model(bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    save_bank(bank, path, {"weights": "abc", "dimensions": ["signal", "noise", "constant"]})
    again = load_bank(path, {"weights": "abc"})
    assert again.layer == bank.layer and again.report == bank.report
    np.testing.assert_array_equal(again.weights, bank.weights)
    with pytest.raises(BadInput, match="another weights .abc. than this one .xyz."):
        load_bank(path, {"weights": "xyz"})


def test_what_cannot_be_fitted_is_refused():
    data = rated()
    for change, message in (
        ({"levels": np.full_like(data.levels, -1)}, "no response of the corpus is rated"),
        ({"means": data.means * np.nan}, "not finite"),
    ):
        with pytest.raises(BadInput, match=message):
            fit_bank(data._replace(**change), "abc", LEVELS)
    with pytest.raises(BadInput, match="layer 9 is out of range; the model has layers 0..2"):
        fit_bank(data, "abc", LEVELS, layers=[9])
