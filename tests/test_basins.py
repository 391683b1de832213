"""Adapters as points of weight space, the basin metrics on cases with a closed form, and the statistics over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from aif.adapter import effective_norm, lora, random_like, rescale, steering_vector, to_norm
from aif.basins import Bench, Measured, Subject, efficiency, generality, ratio, significance, stability
from aif.basins.norms import Grid
from aif.basins.scoring import divergences, grid_losses, losses
from aif.batches import Dataset, build, once
from aif.models.decoder import forward
from aif.statistics import bounds, difference, draws, scalar_and_curves, valued


def deltas(adapter):
    """Every module's dense update, per layer, in float64."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), adapter)
    return {
        name: t["scale"][:, None] * t["u"] if "u" in t else np.einsum("l,lir,lro->lio", t["scale"], t["a"], t["b"])
        for name, t in wide.items()
    }


def norms(adapter):
    """Frobenius norm of every module's update, per layer."""
    return {name: np.sqrt((x.reshape(len(x), -1) ** 2).sum(axis=1)) for name, x in deltas(adapter).items()}


@pytest.fixture(scope="module")
def vector(lm):
    fresh = steering_vector(lm.config, layers=[1])
    return {"vector": {**fresh["vector"], "u": jax.random.normal(jax.random.key(8), fresh["vector"]["u"].shape)}}


@pytest.fixture(scope="module")
def data(lm, rows):
    return build(rows[:4], lm.tokenizer, which="target", length=192, target="discernment")


# Adapters


def test_effective_norm_is_the_dense_norm(adapter, vector):
    for one in (adapter, vector, {**adapter, **vector}):
        dense = np.sqrt(sum((x**2).sum() for x in deltas(one).values()))
        np.testing.assert_allclose(effective_norm(one), dense, rtol=1e-5)


def test_effective_norm_of_nothing(lm):
    fresh = lora(lm.config, rank=2, alpha=4.0, key=jax.random.key(0))
    assert float(effective_norm(fresh)) == 0.0
    assert float(effective_norm(to_norm(fresh, 3.0))) == 0.0


def test_the_gauge_of_an_adapter_does_not_matter(base, adapter, data):
    """A -> A M, B -> M^-1 B leaves the norm and every loss as they are."""
    M = jnp.array([[2.0, 1.0], [-0.5, 1.5]])
    turned = {n: {**t, "a": t["a"] @ M, "b": jnp.linalg.inv(M) @ t["b"]} for n, t in adapter.items()}
    np.testing.assert_allclose(effective_norm(turned), effective_norm(adapter), rtol=1e-5)
    first, second = (
        grid_losses(base, Partial(to_norm, x), jnp.array([0.5, 2.0]), data, rows=2)[0] for x in (adapter, turned)
    )
    np.testing.assert_allclose(second, first, rtol=1e-5)


def test_to_norm_and_rescale(adapter, vector):
    for one in (adapter, vector):
        np.testing.assert_allclose(effective_norm(to_norm(one, 2.5)), 2.5, rtol=1e-5)
        np.testing.assert_allclose(effective_norm(rescale(one, -3.0)), 3 * effective_norm(one), rtol=1e-5)
        for name, delta in deltas(rescale(one, -3.0)).items():
            np.testing.assert_allclose(delta, -3 * deltas(one)[name], rtol=1e-5, atol=1e-7)
    assert (to_norm(adapter, 2.5)["q"]["a"] == adapter["q"]["a"]).all()


def test_random_twins_have_the_norm_of_every_module_and_no_direction_in_common(adapter, vector):
    for one in (adapter, vector):
        twin = random_like(one, jax.random.key(3))
        for name, want in norms(one).items():
            np.testing.assert_allclose(norms(twin)[name], want, rtol=1e-4, atol=1e-6)
    twins = [random_like(adapter, jax.random.key(k)) for k in (3, 4)]
    flat = [np.concatenate([x.ravel() for x in deltas(a).values()]) for a in (adapter, *twins)]
    unit = np.stack([x / np.linalg.norm(x) for x in flat])
    np.testing.assert_allclose(unit @ unit.T, np.eye(3), rtol=0, atol=0.05)


# Stability


@pytest.mark.parametrize("e", [0.0, 0.1, 0.6, 1.0])
def test_perturbing_keeps_norms_and_turns_by_e(adapter, vector, e):
    """Every A, B and u keeps its norm, its cosine to itself is sqrt(1 - e^2), and scale is untouched."""
    for one in (adapter, vector):
        noisy = stability.perturb(one, jax.random.key(0), jnp.float32(e))
        for name, target in one.items():
            np.testing.assert_array_equal(noisy[name]["scale"], target["scale"])
            for leaf in set(target) - {"scale"}:
                x, y = (np.asarray(a[leaf], np.float64).reshape(len(a[leaf]), -1) for a in (target, noisy[name]))
                size = np.linalg.norm(x, axis=1)
                np.testing.assert_allclose(np.linalg.norm(y, axis=1), size, rtol=1e-5)
                cosine = (x * y).sum(axis=1) / size**2
                np.testing.assert_allclose(cosine, np.sqrt(1 - e**2), rtol=0, atol=1e-5)


def test_perturbing_draws_anew_for_every_key_and_leaf(adapter):
    one, two = (stability.perturb(adapter, jax.random.key(k), jnp.float32(1.0)) for k in (0, 1))
    same = lambda x, y: float(jnp.sum(x * y) / jnp.linalg.norm(x) / jnp.linalg.norm(y))  # noqa: E731
    assert abs(same(one["q"]["a"].ravel(), two["q"]["a"].ravel())) < 0.3
    assert abs(same(one["k"]["a"].ravel(), one["v"]["a"].ravel())) < 0.3
    assert abs(same(one["gate"]["b"].ravel(), one["up"]["b"].ravel())) < 0.3


def test_stability_of_a_quadratic_bowl(vector):
    """L_r(x) = c_r ||x - x*||^2 with the solution at the bottom: L(x'(e)) = 2 c_r ||x*||^2 (1 - sqrt(1 - e^2)), and the
    base model, x = 0, loses c_r ||x*||^2, so 200 (1 - sqrt(1 - e^2)) percent of the gain is lost."""
    c, tokens, eps = np.array([1.0, 2.0, 5.0]), np.array([1.0, 3.0, 2.0]), np.array([0.1, 0.5, 1.0])
    bottom = np.asarray(vector["vector"]["u"], np.float64)

    def loss(adapter):
        return c * tokens * ((np.asarray(adapter["vector"]["u"], np.float64) - bottom) ** 2).sum()

    noisy = [
        np.mean([loss(stability.perturb(vector, jax.random.key(k), jnp.float32(e))) for k in range(3)], axis=0)
        for e in eps
    ]
    at_base = loss({"vector": {"u": np.zeros_like(bottom)}})
    curve, area = stability._quantities(
        Subject("x", vector), eps, np.stack(noisy, axis=1), loss(vector), at_base, tokens
    )
    want = 200 * (1 - np.sqrt(1 - eps**2))
    for w in (np.ones(3), np.array([2.0, 0.0, 1.0])):
        np.testing.assert_allclose(curve.value(w), want, rtol=1e-4)
        np.testing.assert_allclose(area.value(w), want.mean(), rtol=1e-4)
    assert (curve.x, curve.better, curve.unit) == (tuple(eps), "lower", "%")


# Efficiency


def test_efficiency_of_a_quadratic_bowl(vector):
    """L(n) = (n - 2)^2 per token: base loss 4, minimum 0 at norm 2, gain per squared norm 4/n - 1."""
    grid, tokens = np.linspace(0.5, 4.0, 8), np.array([2.0, 4.0])
    sums = np.outer(tokens, (grid - 2) ** 2)
    subject = Subject("x", vector)
    scale = Grid([subject], grid, common=5)
    found = {m.quantity: m for m in efficiency._quantities(subject, scale, sums, 4 * tokens, tokens)}
    w = np.array([1.0, 1.0])
    np.testing.assert_allclose(found["loss"].value(w), (grid - 2) ** 2, rtol=1e-12)
    np.testing.assert_allclose(found["gain per squared norm"].value(w), 4 / grid - 1, rtol=1e-12)
    assert found["minimum loss"].value(w) == 0.0
    assert found["norm at the minimum"].value(w) == 2.0
    assert found["gain at the common norm"].value(w) == 3.0


# Scoring and significance


def test_losses_are_in_response_order(base, data):
    """Packed two to a row and in batches of one or three rows: the same sums and counts."""
    first, second = (losses(base, data, rows=n) for n in (1, 3))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-6)
    np.testing.assert_array_equal(first[1], [len(e["targets"]) for e in data.examples])
    assert (first[0] > 0).all()


@pytest.mark.parametrize("what", ["adapter", "weights"])
def test_divergences_are_the_explicit_KL(base, adapter, data, what):
    """sum over scored tokens of sum_v p ln(p / q), from full softmaxes in float64; weights with a head of their own."""
    other = base.replace(adapter=adapter)
    if what == "weights":
        other = base.replace(params=jax.tree.map(lambda x: 1.1 * x, base.params))
    got, tokens = divergences(base, [other], data, rows=2)
    want = np.zeros(len(data.owners))

    @jax.jit
    def log_p(policy, batch):
        return jax.nn.log_softmax(policy(batch).hidden @ policy.head.weight.T)

    for batch in once(data, rows=2):
        p, q = (np.asarray(log_p(policy, batch), np.float64) for policy in (base, other))
        for b, n in np.argwhere(batch.weights > 0):
            at = batch.index[b, n]
            kl = (np.exp(p[b, at]) * (p[b, at] - q[b, at])).sum()
            want[batch.ids[b, batch.response[b, n]]] += kl
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-4)
    np.testing.assert_array_equal(tokens, [len(e["targets"]) for e in data.examples])


def test_significance_of_nothing_is_nothing(lm, base, adapter, data):
    """A zero adapter moves no prediction; a random twin of it is zero too; a real one does move them."""
    zero = rescale(adapter, 0.0)
    sums, _ = divergences(base, [base.replace(adapter=zero), base.replace(adapter=adapter)], data, rows=2)
    np.testing.assert_allclose(sums[:, 0], 0.0, atol=1e-6)
    assert (sums[:, 1] > 1e-2).all()


def test_significance_measures_on_plain_text(lm, base, adapter, data, vector):
    """Norms are factors of the mean own norm of a kind; every subject and one twin a kind has curve and number."""
    bench = Bench(
        base=base,
        subjects=[Subject("x", adapter), Subject("y", rescale(adapter, 3.0)), Subject("v", vector)],
        target=data,
        alternatives=data,
        alternatives_elsewhere=data,
        tokenizer=lm.tokenizer,
        rows=2,
        key=jax.random.key(0),
    )
    options = significance.Options(texts=2, tokens=40, factors=[0.5, 1.0])
    found = {(m.subject, m.quantity): m for m in significance.measure(bench, options)}
    subjects = {"x", "y", "random lora", "v", "random vector"}
    assert {s for s, _ in found} == subjects and len(found) == 10
    ones, own = np.ones(2), float(effective_norm(adapter))
    curve = found["x", "KL from the base model"]
    np.testing.assert_allclose(curve.x, [own, 2 * own], rtol=1e-5)
    np.testing.assert_allclose(curve.value(ones)[1], found["x", "KL at the common norm"].value(ones), rtol=1e-6)
    np.testing.assert_allclose(curve.value(ones), found["y", "KL from the base model"].value(ones), rtol=1e-3)
    assert 0 < curve.value(ones)[0] < curve.value(ones)[1]
    assert found["random vector", "KL at the common norm"].control


def test_a_steered_base_is_a_vector_solution(base, vector, data):
    """The vector adapter and the same vector added by hand to the residual give one loss."""
    from aif.steering import add

    u = vector["vector"]["u"]
    batch = next(once(data, rows=2))
    edits = add(u, jnp.ones(1), jnp.linalg.norm(u, axis=-1), layers=[1])
    run = jax.jit(lambda p, b: forward(p.config, p.params, b.tokens, adapter=p.adapter, edits=p.edits).hidden)
    got, want = run(base.replace(adapter=vector), batch), run(base.replace(edits=edits), batch)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


# Generality


def plain_dataset(owners, liked):
    return Dataset((), {"preference": np.where(liked, 1.0, -1.0)}, tuple(owners), 0, 0, 0)


def test_log_odds_by_hand():
    """Prompt 0: -6/3 - mean(-4/2, -8/2) = 1; prompt 1: -1/1 - (-2/4) = -1/2."""
    data = plain_dataset([(0, 3), (0, 0), (0, 1), (1, 3), (1, 0)], np.array([True, False, False, True, False]))
    got = generality.log_odds(np.array([6.0, 4.0, 8.0, 1.0, 2.0]), np.array([3.0, 2.0, 2.0, 1.0, 4.0]), data)
    np.testing.assert_allclose(got, [1.0, -0.5])


# Statistics


def measured(values, subject, seed=0, better="higher", **other):
    values = np.asarray(values, float)
    fields = {"metric": "m", "quantity": "q", "unit": "u", "control": False, "row_name": "rows", **other}
    value = ratio(values, np.ones(len(values)))
    return Measured(better=better, subject=subject, seed=seed, rows=len(values), value=value, **fields)


def test_ratio_is_token_weighted():
    """(1 * 6 + 2 * 1) / (1 * 3 + 2 * 1) for weights (1, 2)."""
    assert ratio(np.array([6.0, 1.0]), np.array([3.0, 1.0]))(np.array([1.0, 2.0])) == 8 / 5


def test_bootstrap_interval_of_a_mean():
    """Within a few percent of mean +- 1.96 s / sqrt(n)."""
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    value, samples = valued([measured(x, "a")], 4000, 0)
    low, high = bounds(samples)
    half = 1.96 * x.std() / 20
    np.testing.assert_allclose(value, x.mean(), rtol=1e-12)
    np.testing.assert_allclose([low, high], [x.mean() - half, x.mean() + half], rtol=0, atol=0.05 * 2 * half)


def test_draws_are_resamples():
    w = draws(7, 50, 3)
    assert w.shape == (50, 7) and (w.sum(axis=1) == 7).all() and (w >= 0).all()
    np.testing.assert_array_equal(w, draws(7, 50, 3))
    assert (w != draws(7, 50, 4)).any()


def test_pairing_takes_the_rows_variance_out():
    """Arms that share every row's difficulty: their difference is far tighter than either mean."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 5, 60)
    a, b = measured(shared + 0.5 + 0.1 * rng.normal(size=60), "a"), measured(shared, "b")
    (d,) = difference([a, b], "b", ["a"], 1000, 0)
    one = valued([a], 1000, 0)[1]
    assert d.high - d.low < 0.1 * (bounds(one)[1] - bounds(one)[0])
    assert d.low <= 0.5 + 0.05 and d.high >= 0.5 - 0.05
    assert (d.verdict, d.label) == ("arm better", "single seed")


@pytest.mark.parametrize(
    "shift,better,verdict",
    [
        (1.0, "higher", "arm better"),
        (1.0, "lower", "baseline better"),
        (-1.0, "higher", "baseline better"),
        (-1.0, "lower", "arm better"),
        (0.0, "higher", "no difference shown"),
    ],
)
def test_the_verdict_follows_from_the_interval(shift, better, verdict):
    rng = np.random.default_rng(2)
    x = rng.normal(size=50)
    noise = rng.normal(size=50)
    arm = measured(x + shift + 0.5 * (noise - noise.mean()), "arm", better=better)
    (d,) = difference([arm, measured(x, "base", better=better)], "base", ["arm"], 500, 0)
    assert d.verdict == verdict
    assert (d.low > 0 or d.high < 0) == (verdict != "no difference shown")
    assert d.label == ("single seed" if shift else "not supported")
    np.testing.assert_allclose(d.value, shift, atol=1e-12)


def test_seeds_are_averaged_and_resampled():
    """Two seeds two apart: the value is their mean, and the interval reaches towards both."""
    x = np.linspace(-0.1, 0.1, 40)
    group = [measured(x, "a", seed=0), measured(x + 2.0, "a", seed=1)]
    ((scalar,), _) = scalar_and_curves(group, 2000, 0)
    np.testing.assert_allclose(scalar.value, 1.0, atol=1e-12)
    assert scalar.low < 0.1 and scalar.high > 1.9
    assert (scalar.seeds, scalar.label, scalar.n) == ([0, 1], "measured", 40)


def test_quantities_that_have_no_better_side_are_not_compared():
    assert difference([measured([1, 2], "a", better=""), measured([3, 4], "b", better="")], "b", ["a"], 50, 0) == []


def test_curves_have_an_interval_at_every_point():
    sums = np.random.default_rng(3).normal(size=(30, 4))
    m = measured(np.zeros(30), "a", x=(1.0, 2.0, 3.0, 4.0), x_label="n")
    m = Measured(**{**m.__dict__, "value": ratio(sums, np.ones(30))})
    (scalars, (curve,)) = scalar_and_curves([m], 200, 0)
    assert scalars == [] and len(curve.low) == 4
    np.testing.assert_allclose(curve.value, sums.mean(axis=0), rtol=1e-12)
    assert all(l < v < h for l, v, h in zip(curve.low, curve.value, curve.high, strict=True))
