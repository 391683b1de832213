"""Efficiency, stability and significance on a model of two parameters, where each curve is known in closed form, and
what must not change them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.adapter import change, effective_norm, merge, random_like, rescale, to_norm
from aif.basins import Bench, Subject, efficiency, scoring, significance, stability
from aif.basins.scoring import carrying, losses, stacked
from aif.batches import build
from aif.models.decoder import DecoderConfig, shapes
from aif.policy import Policy

EPS, GAIN = 1e8, 1e4  # the final norm divides by sqrt(|u|^2 / 2 + EPS) and multiplies by GAIN: the identity
LETTERS = np.arange(97, 123)  # tokens whose logit is u_1; all others have logit 0


def curve_of(measured, subject, quantity):
    (found,) = [m for m in measured if (m.subject, m.quantity) == (subject, quantity)]
    return np.asarray(found.value(np.ones(found.rows)))


def two_parameters(vocab: int) -> Policy:
    """h = u at every token, logits = u_1 [v is a letter]: p(letter) = e^u1 / (26 e^u1 + V - 26)."""
    config = DecoderConfig("toy", vocab, 2, 1, 1, 1, 2, 1, norm_eps=EPS, tied=False)
    params = jax.tree.map(jnp.zeros, shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    head = jnp.zeros((vocab, 2)).at[LETTERS, 0].set(1.0)
    return Policy({**params, "norm": jnp.full(2, GAIN), "head": head}, config=config)


def vector_of(x: float, y: float) -> dict:
    return {"vector": {"u": jnp.array([[x, y]]), "scale": jnp.ones(1)}}


def bench_of(lm, policy, subjects, data, **other) -> Bench:
    parts = {"target": data, "alternatives": data, "alternatives_elsewhere": data, "rows": 2, "key": jax.random.key(0)}
    return Bench(base=policy, subjects=subjects, tokenizer=lm.tokenizer, **{**parts, **other})


@pytest.fixture(scope="module")
def data(lm, rows):
    return build(rows[:4], lm.tokenizer, which="target", length=192, target="discernment")


@pytest.fixture(scope="module")
def small(lm, data):
    """The model of two parameters, its loss in closed form, and a solution 30 degrees away from u_1."""
    policy = two_parameters(lm.config.vocab)
    V = lm.config.vocab
    targets = np.concatenate([e["targets"] for e in data.examples])
    share = np.isin(targets, LETTERS).mean()
    loss = lambda u1: np.log(26 * np.exp(u1) + V - 26) - share * u1  # noqa: E731
    own = 2.0
    subject = Subject("x", vector_of(own * np.cos(np.pi / 6), own * np.sin(np.pi / 6)))
    return bench_of(lm, policy, [subject], data), loss, own, V


def test_efficiency_in_closed_form(small):
    """L(n) = ln(26 e^(n cos 30) + V - 26) - share n cos 30."""
    bench, loss, own, _ = small
    found = efficiency.measure(bench, efficiency.Options(factors=[0.2, 1.0, 1.5, 2.0]))
    norms = own * np.array([0.2, 1.0, 1.5, 2.0])
    want = loss(norms * np.cos(np.pi / 6))
    np.testing.assert_allclose(curve_of(found, "x", "loss"), want, rtol=1e-5)
    np.testing.assert_allclose(
        curve_of(found, "x", "gain per squared norm"), (loss(0.0) - want) / norms**2, rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(curve_of(found, "x", "minimum loss"), want.min(), rtol=1e-5)
    np.testing.assert_allclose(curve_of(found, "x", "norm at the minimum"), norms[want.argmin()], rtol=1e-5)
    np.testing.assert_allclose(curve_of(found, "x", "gain at the common norm"), loss(0.0) - want[1], rtol=1e-4)
    twin = random_like(bench.subjects[0].adapter, jax.random.fold_in(bench.key, 0))["vector"]["u"][0]
    np.testing.assert_allclose(curve_of(found, "random vector", "loss"), loss(norms / own * float(twin[0])), rtol=1e-5)


def test_stability_in_closed_form(small):
    """In two dimensions the noise is +-90 degrees: u_1 = |x| (sqrt(1 - e^2) cos 30 -+ e sin 30)."""
    bench, loss, own, _ = small
    eps = np.array([0.1, 0.5, 1.0])
    found = stability.measure(bench, stability.Options(eps=eps.tolist(), noise_seeds=4))
    x = bench.subjects[0].adapter
    signs = [
        np.sign(float(stability.perturb(x, jax.random.fold_in(bench.key, k), jnp.float32(1.0))["vector"]["u"][0, 0]))
        for k in range(4)
    ]
    assert set(signs) == {-1.0, 1.0}  # both ways were drawn
    turned = lambda s: own * (np.sqrt(1 - eps**2) * np.cos(np.pi / 6) + s * eps * np.sin(np.pi / 6))  # noqa: E731
    at_own, at_base = loss(own * np.cos(np.pi / 6)), loss(0.0)
    want = 100 * (np.mean([loss(turned(s)) for s in signs], axis=0) - at_own) / (at_base - at_own)
    np.testing.assert_allclose(curve_of(found, "x", "gain lost"), want, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(curve_of(found, "x", "mean gain lost"), want.mean(), rtol=1e-3)


def test_significance_in_closed_form(small):
    """KL(uniform || p) = ln(26 e^u1 + V - 26) - 26 u1 / V - ln V."""
    bench, _, own, V = small
    found = significance.measure(bench, significance.Options(texts=2, tokens=40, factors=[0.5, 1.0, 2.0]))
    u1 = own * np.array([0.5, 1.0, 2.0]) * np.cos(np.pi / 6)
    want = np.log(26 * np.exp(u1) + V - 26) - 26 * u1 / V - np.log(V)
    np.testing.assert_allclose(curve_of(found, "x", "KL from the base model"), want, rtol=1e-4)
    np.testing.assert_allclose(curve_of(found, "x", "KL at the common norm"), want[1], rtol=1e-4)


# What must not change a curve


def all_curves(bench) -> dict:
    found = efficiency.measure(bench, efficiency.Options(factors=[0.5, 1.0], controls=0))
    found += significance.measure(bench, significance.Options(texts=2, tokens=40, factors=[0.5, 1.0], controls=0))
    return {(m.subject, m.quantity): np.asarray(m.value(np.ones(m.rows))) for m in found}


def test_the_gauge_changes_no_curve(lm, base, adapter, data):
    """A -> A M, B -> M^-1 B: the same update, so the same efficiency and significance and the same norm."""
    M = jnp.array([[2.0, 1.0], [-0.5, 1.5]])
    turned = {n: {**t, "a": t["a"] @ M, "b": jnp.linalg.inv(M) @ t["b"]} for n, t in adapter.items()}
    one, two = (all_curves(bench_of(lm, base, [Subject("x", x)], data)) for x in (adapter, turned))
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4, err_msg=str(key))


def test_the_order_of_rows_and_padding_change_no_curve(lm, base, adapter, rows):
    """The same rows the other way round, in longer rows of the batch, more of them at a time."""
    plain = build(rows[:4], lm.tokenizer, which="target", length=192, target="discernment")
    other = build(rows[:4][::-1], lm.tokenizer, which="target", length=320, target="discernment")
    one = all_curves(bench_of(lm, base, [Subject("x", adapter)], plain))
    two = all_curves(bench_of(lm, base, [Subject("x", adapter)], other, rows=5))
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5, err_msg=str(key))


def test_stacked_batches_hold_every_response_once(data):
    for rows in (1, 3):
        batches = stacked(data, rows)
        ids = batches.ids[batches.ids >= 0]
        assert sorted(ids) == list(range(len(data.owners)))
        assert (batches.segments.any(axis=(-1)).sum()) > batches.tokens.shape[0] * (batches.tokens.shape[1] - 1)


def test_a_grid_is_its_points_one_by_one(base, adapter, data):
    """lax.map and vmap over the points give what separate policies give."""
    points = jnp.array([0.5, 2.0])
    batches = stacked(data, 2)
    family = jax.tree_util.Partial(to_norm, adapter)
    apart = np.stack([losses(base.replace(adapter=to_norm(adapter, n)), data, rows=2)[0] for n in points], axis=1)
    for together in (False, True):
        got = scoring._grid_losses(base, family, points, batches, together=together)
        np.testing.assert_allclose(scoring.in_order(batches.ids, got), apart, rtol=1e-5)


# Full fine-tunes


def test_a_full_fine_tune_is_measured_as_the_adapter_it_equals(lm, base, adapter, data):
    """W + scale A B as changed weights: the norm, the losses at every norm and the KL of the adapter."""
    whole = change(merge(base.config, base.params, adapter), base.params)
    np.testing.assert_allclose(effective_norm(whole), effective_norm(adapter), rtol=1e-4)
    one, two = (all_curves(bench_of(lm, base, [Subject("x", x)], data)) for x in (adapter, whole))
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=2e-3, err_msg=str(key))
    assert Subject("x", whole).kind == "full"


def test_twins_and_noise_of_a_full_fine_tune(base, adapter):
    whole = change(jax.tree.map(lambda x: 1.1 * x, base.params), base.params)
    twin, noisy = random_like(whole, jax.random.key(0)), stability.perturb(whole, jax.random.key(0), jnp.float32(0.6))
    for name, part in whole.items():
        per_layer = lambda p: np.linalg.norm(np.asarray(p["d"]).reshape(len(p["d"]), -1), axis=1)  # noqa: E731
        np.testing.assert_allclose(per_layer(twin[name]), per_layer(part), rtol=1e-4)
        np.testing.assert_allclose(per_layer(noisy[name]), per_layer(part), rtol=1e-4)
    halved = carrying(base, rescale(whole, 0.5)).params
    np.testing.assert_allclose(halved["embed"], 1.05 * base.params["embed"], rtol=1e-5)
    assert halved.keys() == base.params.keys()


# One compilation each


def test_a_metric_compiles_once(lm, base, adapter, data):
    """Two solutions, a random twin and three noise seeds: one program for each metric's grid."""
    subjects = [Subject("x", to_norm(adapter, 1.0)), Subject("y", rescale(adapter, 2.0))]
    bench = bench_of(lm, base, subjects, replace(data, tables={}), rows=3)
    before = scoring._grid_losses._cache_size()
    efficiency.measure(bench, efficiency.Options(factors=[0.3, 0.7, 1.0]))
    assert scoring._grid_losses._cache_size() == before + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "too_small", lambda gain, base: "")
        stability.measure(bench, stability.Options(eps=[0.2, 0.4, 0.6], noise_seeds=3))
    assert scoring._grid_losses._cache_size() == before + 2
    before = scoring._grid_divergences._cache_size()
    significance.measure(bench, significance.Options(texts=2, tokens=48, factors=[0.3, 0.7, 1.0]))
    assert scoring._grid_divergences._cache_size() == before + 1


# Cases without a number


def test_what_has_no_number_is_left_out_and_said(lm, base, adapter, data):
    """A zero adapter has no norm to be rescaled to; a solution that is worse than the base model gains nothing."""
    notes: list[str] = []
    fresh = rescale(adapter, 0.0)
    bench = bench_of(lm, base, [Subject("nothing", fresh), Subject("x", adapter)], data, note=notes.append)
    found = efficiency.measure(bench, efficiency.Options(factors=[1.0]))
    assert {m.subject for m in found} == {"x", "random lora"}
    assert "nothing is left out" in notes[0] and "norm is zero" in notes[0]
    found += significance.measure(bench, significance.Options(texts=2, tokens=40, factors=[1.0]))
    assert all(np.isfinite(m.value(np.ones(m.rows))).all() for m in found)
    only = bench_of(lm, base, [Subject("nothing", fresh)], data, note=notes.append)
    assert efficiency.measure(only, efficiency.Options()) == [] == stability.measure(only, stability.Options())


@pytest.mark.parametrize(
    "gain,why",
    [([0.1, 0.1], ""), ([0.001, 0.001], "a share"), ([-1.0, 0.5], "a share"), ([1.0, -0.8], "two standard errors")],
)
def test_a_share_of_no_gain_is_none(gain, why):
    assert (
        (why in stability.too_small(np.array(gain), np.array([10.0, 10.0])))
        if why
        else not stability.too_small(np.array(gain), np.array([10.0, 10.0]))
    )
