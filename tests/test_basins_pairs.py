"""Metrics that compare solutions or take them further: geometry, connectivity, transfer, metastability, context."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.adapter import between, change, effective_norm, inner, lora, merge, random_like, rescale
from aif.basins import Bench, Subject, connectivity, context, geometry, metastability, transfer
from aif.basins.generality import log_odds
from aif.basins.scoring import carrying, losses
from aif.batches import build
from aif.errors import BadInput
from tests.conftest import awake
from tests.test_basins_curves import two_parameters, vector_of


@pytest.fixture(scope="module")
def data(lm, rows):
    return {w: build(rows[:3], lm.tokenizer, which=w, length=320, target="discernment") for w in ("target", "all")}


@pytest.fixture(scope="module")
def other(lm):
    """A solution of another rank."""
    return awake(lora(lm.config, rank=3, alpha=3.0, key=jax.random.key(15)), jax.random.key(16))


def bench_of(lm, policy, subjects, data, rows=(), **more) -> Bench:
    parts = {"target": data["target"], "alternatives": data["all"], "alternatives_elsewhere": data["all"]}
    parts |= {"training": data["target"], "stance": "discernment", "shown": rows[3:], "asked": rows[:3], "rows": 2}
    return Bench(base=policy, subjects=subjects, tokenizer=lm.tokenizer, key=jax.random.key(0), **{**parts, **more})


def values(found) -> dict:
    return {(m.subject, m.quantity): np.asarray(m.value(np.ones(m.rows))) for m in found}


def dense(base, adapter) -> np.ndarray:
    whole = change(merge(base.config, base.params, adapter), base.params)
    return np.concatenate([np.asarray(part["d"], np.float64).ravel() for part in whole.values()])


# Products and lines of adapters


def test_products_and_lines_are_those_of_the_dense_updates(base, adapter, other):
    x, y = dense(base, adapter), dense(base, other)
    np.testing.assert_allclose(sum(float(v.sum()) for v in inner(adapter, other).values()), x @ y, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dense(base, between(adapter, other, 0.3)), 0.7 * x + 0.3 * y, rtol=0, atol=1e-5)
    some = {"q": other["q"]}
    want = 0.7 * x + 0.3 * dense(base, some)
    np.testing.assert_allclose(dense(base, between(adapter, some, 0.3)), want, rtol=0, atol=1e-5)
    half = between(vector_of(2.0, 0.0), vector_of(0.0, 4.0), 0.5)
    np.testing.assert_allclose(half["vector"]["scale"][:, None] * half["vector"]["u"], [[1.0, 2.0]])


# Geometry


def test_cosines_are_the_dense_ones(lm, base, adapter, other, data):
    found = values(
        geometry.measure(bench_of(lm, base, [Subject("x", adapter), Subject("y", other)], data), geometry.Options())
    )
    x, y = dense(base, adapter), dense(base, other)
    want = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    np.testing.assert_allclose(found["y", "cosine with x"], want, atol=1e-4)
    assert found["y", "cosine with x, by layer"].shape == (lm.config.layers,)
    assert abs(found["random lora", "cosine with x"]) < 0.1
    assert 0 < found["y", "overlap with x"] < 1
    same = values(
        geometry.measure(
            bench_of(lm, base, [Subject("x", adapter), Subject("y", rescale(adapter, -2.0))], data),
            geometry.Options(controls=0),
        )
    )
    np.testing.assert_allclose([same["y", "cosine with x"], same["y", "overlap with x"]], [-1, 1], rtol=1e-5)


def test_overlap_is_of_spaces():
    """B spans (1, 0, 0) and (0, 1, 0); B' spans (1, 0, 0) and (0, 0, 1): squared cosines 1 and 0."""
    x = {"q": {"b": jnp.array([[[1.0, 0, 0], [1.0, 1.0, 0]]])}}
    y = {"q": {"b": jnp.array([[[2.0, 0, 0], [1.0, 0, 3.0]]])}}
    np.testing.assert_allclose(geometry.overlaps(x, y), [0.5], atol=1e-6)


def test_what_nothing_changes_is_no_row(lm, data):
    """A vector at one of three layers is one weight matrix: an interval over matrices has nothing else to draw."""
    x, y = (
        {"vector": {"u": jnp.zeros((3, 2)).at[1].set(jnp.array(u)), "scale": jnp.ones(3)}} for u in ([1.0, 0], [1.0, 1])
    )
    bench = bench_of(lm, two_parameters(lm.config.vocab), [Subject("x", x), Subject("y", y)], data)
    found = {m.quantity: m for m in geometry.measure(bench, geometry.Options(controls=0))}
    one = found["cosine with x"]
    assert one.rows == 1
    np.testing.assert_allclose(one.value(np.ones(1)), 0.5**0.5, rtol=1e-5)


def test_a_straight_path_has_one_component(adapter):
    """Points at 0, 1 and 3 times x: one component holds them, centred at 4/3, in units of the effective norm."""
    path = [rescale(adapter, f) for f in (0.0, 1.0, 3.0)]
    parts, variance = geometry.components(geometry.products(path), 2)
    assert parts.shape[1:] == (3, 1)
    own = float(effective_norm(adapter))
    np.testing.assert_allclose(parts.sum(axis=0)[:, 0] / own, [-4 / 3, -1 / 3, 5 / 3], rtol=1e-4)
    np.testing.assert_allclose(variance.sum(axis=0) / variance.sum(), [1.0, 0.0, 0.0], atol=1e-5)


def test_components_are_those_of_scikit_learn(base, adapter):
    """Products of low-rank parts alone give the PCA of the weight changes, built whole."""
    from sklearn.decomposition import PCA

    points = [random_like(adapter, key) for key in jax.random.split(jax.random.key(5), 4)]
    whole = np.stack([dense(base, x) for x in points])
    pca = PCA(2).fit(whole)
    parts, variance = geometry.components(geometry.products(points), 2)
    places = pca.transform(whole)
    np.testing.assert_allclose(np.abs(parts.sum(axis=0)), np.abs(places), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(variance.sum(axis=0)[:2] / variance.sum(), pca.explained_variance_ratio_, rtol=1e-3)


def test_paths_lie_in_one_plane_for_all_arms(lm, data):
    """One arm goes along one weight and back to half, the other along the other: two components and nothing else."""
    ways = {"a": [(0, 0.0, 0.0), (2, 4.0, 0.0), (4, 2.0, 0.0)], "b": [(0, 0.0, 0.0), (4, 0.0, 4.0)]}
    paths = {(arm, 0): {n: vector_of(x, y) for n, x, y in way} for arm, way in ways.items()}
    paths["a", 1] = {0: vector_of(0.0, 0.0), 4: vector_of(9.0, 9.0)}  # another seed is not drawn into it
    policy = two_parameters(lm.config.vocab)
    found = values(geometry.paths(bench_of(lm, policy, [], data, paths=paths)))
    a, b = (np.stack([found[arm, f"path, component {k}"] for k in (1, 2)], axis=1) for arm in ("a", "b"))
    lengths = lambda x: np.linalg.norm(np.diff(x, axis=0), axis=1)  # noqa: E731
    np.testing.assert_allclose(lengths(a), [4.0, 2.0], rtol=1e-5)
    np.testing.assert_allclose(lengths(b), [4.0], rtol=1e-5)
    np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    share = [found["all paths", f"variance along component {k}"] for k in (1, 2)]
    np.testing.assert_allclose(sum(share), 100.0, rtol=1e-6)
    assert share[0] > share[1] > 0 and geometry.paths(bench_of(lm, policy, [], data)) == []


# Connectivity


def test_barrier_by_hand():
    """L = 1, 4, 2 at t = 0, 1/2, 1: the line is 1.5 in the middle, the barrier 2.5; for the second row 0."""
    sums, tokens = np.array([[1.0, 4.0, 2.0], [3.0, 2.0, 1.0]]), np.ones(2)
    at = np.array([0.0, 0.5, 1.0])
    barrier = partial(connectivity.barrier, sums=sums, tokens=tokens, at=at)
    assert barrier(np.array([1.0, 0.0])) == 2.5 and barrier(np.array([0.0, 1.0])) == 0.0
    np.testing.assert_allclose(barrier(np.ones(2)), 1.25)


def test_the_line_joins_the_losses_of_its_ends(lm, base, adapter, other, data):
    bench = bench_of(lm, base, [Subject("x", adapter), Subject("y", other)], data)
    found = values(connectivity.measure(bench, connectivity.Options(points=3, controls=0)))
    middle = (dense(base, adapter) + dense(base, other)) / 2
    flat, tree = jax.tree.flatten(change(base.params, base.params))
    ends = np.cumsum([x.size for x in flat])
    parts = [jnp.asarray(p.reshape(x.shape), x.dtype) for p, x in zip(np.split(middle, ends[:-1]), flat, strict=True)]
    for k, change_ in enumerate((adapter, jax.tree.unflatten(tree, parts), other)):
        sums, tokens = losses(carrying(base, change_), data["target"], rows=2)
        np.testing.assert_allclose(found["y", "loss from x"][k], sums.sum() / tokens.sum(), rtol=1e-4)
    assert found["y", "barrier from x"] >= 0


# Transfer


def test_a_vector_transfers_wholly(lm, data):
    """Where a solution is a shift of the residual, its shift produces the whole effect and taking it out removes it; a
    shift at 45 degrees takes half of it."""
    policy = two_parameters(lm.config.vocab)
    notes: list[str] = []
    subjects = [
        Subject("x", vector_of(1.5, 0.0)),
        Subject("y", vector_of(1.0, 1.0)),
        Subject("still", vector_of(0.0, 1.0)),
    ]
    bench = bench_of(lm, policy, subjects, data, note=notes.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "unclear", lambda effect: "" if np.abs(effect).max() > 1e-6 else "zero")
        found = values(transfer.measure(bench, transfer.Options(doses=[0.5, 1.0], layer=0, prompts=None)))
    np.testing.assert_allclose(found["x", "effect produced by its own shift"], 100.0, rtol=1e-3)
    np.testing.assert_allclose(found["x", "effect removed by the shift of x"], 100.0, rtol=1e-3)
    np.testing.assert_allclose(found["y", "effect removed by the shift of x"], 100.0, rtol=1e-3)
    np.testing.assert_allclose(found["x", "effect removed by the shift of y"], 50.0, rtol=1e-2)  # half of u_1 is left
    assert "still is left out" in notes[0]


def test_what_ablation_does_to_the_base_model_is_not_removed(lm, data):
    """A base model that leans towards letters loses its lean with the direction; all of the solution's effect goes, not
    more."""
    policy = two_parameters(lm.config.vocab)
    leaning = policy.replace(params={**policy.params, "embed": policy.params["embed"].at[:, 0].set(0.7)})
    bench = bench_of(lm, leaning, [Subject("x", vector_of(1.5, 0.0))], data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "unclear", lambda effect: "")
        found = values(transfer.measure(bench, transfer.Options(doses=[1.0], layer=0, prompts=None)))
    np.testing.assert_allclose(found["x", "effect removed by the shift of x"], 100.0, rtol=1e-3)


# Metastability


def test_return_and_toggle_with_training_that_is_known(lm, base, adapter, other, data):
    """Training that leads to x regains all; training that does nothing, none; a toggle to y ends at y."""
    subjects = [Subject("x", adapter), Subject("y", other)]
    ends = {"x": adapter, "y": other}
    bench = bench_of(lm, base, subjects, data, arms=("x", "y"), further=lambda subject, arm, steps: ends[arm])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metastability, "too_small", lambda gain, base: "")
        found = values(metastability.measure(bench, metastability.Options(toggle=[("x", "y")], steps=[4])))
        np.testing.assert_allclose(found["x", "gain regained"], 100.0, rtol=1e-4)
        path = found["x, then y", "cosine with y, by step"]
        np.testing.assert_allclose([path[1], found["x, then y", "cosine with y"]], 1.0, rtol=1e-5)
        sizes = [effective_norm(adapter), effective_norm(other)]
        np.testing.assert_allclose(found["x, then y", "norm, by step"], sizes, rtol=1e-4)
        idle = replace(bench, further=lambda subject, arm, steps: subject.adapter)
        found = values(metastability.measure(idle, metastability.Options()))
    np.testing.assert_allclose(
        [found["x", "gain regained"], found["random start for x", "gain regained"]], 0, atol=1e-3
    )
    with pytest.raises(BadInput, match="no arm is called 'z'"):
        metastability.measure(bench, metastability.Options(toggle=[("x", "z")]))


# Context


def test_flip_point_by_hand():
    """Means -1, -0.5, 0.5 at 0, 1, 2 turns: zero at 1.5; a start above zero is 0, and never is the last."""
    flip = partial(context.flip_point, turns=np.array([0.0, 1.0, 2.0]))
    assert flip(np.ones(2), odds=np.array([[-2.0, -1.0, 0.0], [0.0, 0.0, 1.0]])) == 1.5
    assert flip(np.ones(1), odds=np.array([[1.0, -1.0, 1.0]])) == 0.0
    assert flip(np.ones(1), odds=np.array([[-1.0, -1.0, -2.0]])) == 2.0


def test_effective_ranks():
    """Orthogonal rows of one length: as many as there are; equal rows: one; weights choose rows."""
    w = np.ones(3)
    for rank in (context.participation_ratio, context.stable_rank):
        np.testing.assert_allclose(rank(w, gram=np.eye(3)), 3.0)
        np.testing.assert_allclose(rank(w, gram=np.ones((3, 3))), 1.0)
        np.testing.assert_allclose(rank(np.array([2.0, 2.0, 0.0]), gram=np.eye(3)), 2.0)


def test_context_without_turns_is_the_base_model(lm, base, adapter, data, rows):
    bench = bench_of(lm, base, [Subject("x", adapter)], data, rows)
    found = values(context.measure(bench, context.Options(turns=[0, 2], prompts=3)))
    want = log_odds(*losses(base, data["all"], rows=2), data["all"]).mean()
    for name in ("coherent turns", "contrast turns"):
        np.testing.assert_allclose(found[name, "log-odds"][0], want, rtol=1e-4)
    assert not np.isclose(found["coherent turns", "log-odds"][1], found["contrast turns", "log-odds"][1])
    assert found["coherent turns", "projection"][1] > found["coherent turns", "projection"][0]
    assert {("x", "participation ratio"), ("x", "stable rank")} <= found.keys()
    with pytest.raises(BadInput, match="9 turns and only 5"):
        context.measure(bench, context.Options(turns=[1, 9]))


# In a comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison with these metrics on the tiny model, and its page."""
    import aif

    config = aif.load_config(
        "configs/tiny.yaml",
        [
            "~arms.efe",
            "arms.dpo.steps=1",
            "arms.sft.steps=1",
            "arms.more={objective: {name: sft}, steps: 2}",
            "samples.prompts=0",
            "measure={geometry: {}, connectivity: {points: 3}, transfer: {doses: [1.0], prompts: 2, shown: 2}, "
            "metastability: {toggle: [[sft, dpo]], steps: [1]}, context: {turns: [0, 1], prompts: 2}}",
        ],
    )
    out = tmp_path_factory.mktemp("compared") / "run"
    return aif.compare(config, out=out), (out / "report.html").read_text()


def test_every_metric_has_numbers_in_the_table_and_a_section(compared):
    results, page = compared
    found = {s.metric for s in results.scalars}
    assert {"geometry", "connectivity", "context"} <= found
    for record in [*results.scalars, *results.curves]:
        assert np.isfinite([record.value, record.low, record.high]).all(), record
    for word in ("Basin map by loss barrier", "Basin map by direction cosine", "sft, then dpo", "contrast turns"):
        assert word in page, word
    assert {s.arm for s in results.scalars if s.control} >= {"random lora", "contrast turns"}


def test_the_map_keeps_the_distances_of_a_triangle():
    """Sides 3, 4, 5 lie in a plane: classical scaling keeps them exactly."""
    from aif.report.basin_map import classical_scaling

    sides = np.array([[0, 3, 4], [3, 0, 5], [4, 5, 0.0]])
    places, share = classical_scaling(sides)
    got = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.testing.assert_allclose(got, sides, atol=1e-9)
    np.testing.assert_allclose(share, 1.0)
