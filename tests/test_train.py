"""Training: accumulation, AdamW, schedules, clipping, faults, and what the one jitted step may and may not touch."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from aif.adapter import lora, rescale, steering_vector
from aif.batches import build, once
from aif.errors import BadInput
from aif.models.decoder import DecoderConfig, shapes
from aif.objectives import Objective
from aif.objectives.dpo import preference
from aif.objectives.logprobs import token_logprobs
from aif.objectives.sft import sft
from aif.policy import Policy
from aif.train import MAX_SKIPPED, Optimizer, Settings, as_partial, attach, prepared, stage, start_state, train_step
from aif.types import Loss, Mean

CALM = Optimizer(learning_rate=1e-2, schedule="constant", eps=1e-3)  # eps keeps a gradient of 0 away from 0 / 0
ONE = jnp.float32(1)
BIASED = DecoderConfig(
    "toy", vocab=7, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, ff=6, tied=False, qkv_bias=True
)
EMPTY = Policy({}, config=BIASED)  # for losses that read the trainable values alone


@pytest.fixture(scope="module")
def data(lm, rows):
    """The data set of either kind of objective."""
    make = lambda which: build(rows, lm.tokenizer, which=which, length=384, target="discernment")  # noqa: E731
    return {which: make(which) for which in ("target", "pair")}


@pytest.fixture(scope="module")
def pairs(data, base):
    """Pairs with the reference's log-probabilities."""
    return prepared(preference(), base, data["pair"], rows=2, key=jax.random.key(0))


@pytest.fixture(scope="module")
def fresh(lm):
    """An adapter of every kind of part, in layer 1 alone: low-rank factors with B = 0, and a vector of zeros."""
    low_rank = lora(lm.config, rank=2, alpha=4.0, layers=[1], key=jax.random.key(0))
    return {**low_rank, **steering_vector(lm.config, layers=[1])}


def stacked(batch, parts: int = 1):
    """The rows of a batch as so many micro-batches."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)


@pytest.fixture(scope="module")
def some(data):
    """A step's batches, for losses that read nothing from them."""
    return stacked(next(once(data["target"], rows=1)))


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def same(left, right) -> bool:
    """Bit for bit."""
    left, right = leaves(left), leaves(right)
    return left.keys() == right.keys() and all(left[k].tobytes() == right[k].tobytes() for k in left)


def first_moment(state) -> dict[str, np.ndarray]:
    return leaves(state.optimizer[1].mu)


def quadratic(policy, batch, *, target=None, hard=1.0):
    """sum hard (x - target)^2 / 2 over the adapter's values, whatever the batch holds."""
    target = jax.tree.map(jnp.zeros_like, policy.adapter) if target is None else target
    parts = jax.tree.map(lambda x, t: jnp.sum(hard * jnp.square(x - t)) / 2, policy.adapter, target)
    return Loss(Mean(sum(jax.tree.leaves(parts)), ONE), {})


def values(**changes) -> dict:
    return replace(Optimizer(schedule="constant", clip=0.0), **changes).values(0, 1)


def stepped(trainable, batches, loss, *settings, base=EMPTY, full=False):
    """The state and log after a step with each of these settings."""
    state, log = start_state(trainable, jax.random.key(0)), {}
    for setting in settings:
        state, log = train_step(state, base, batches, loss, setting, full=full)
    return state, {name: float(mean.value) for name, mean in log.items()}


# The step


def bytes_loss(policy, batch):
    """A cheap loss that is not linear in the adapter and weighs tokens: cos(u . (token, target)) of every token."""
    u = policy.adapter["vector"]["u"]
    angle = u[0, batch.targets % 64] + u[1, batch.response + batch.targets // 64]
    total = Mean(jnp.sum(batch.weights * jnp.cos(3 * angle)), jnp.sum(batch.weights))
    return Loss(total, {"tokens": total})


@pytest.mark.parametrize("name", ["bytes", "dpo"])
def test_accumulation_is_one_batch_of_all_micro_batches(name, base, adapter, data, pairs):
    """Micro-batches of uneven weight: the gradient is that of the sum of losses over the sum of weights."""
    if name == "bytes":
        policy, batch, loss = EMPTY, next(once(data["target"], rows=4)), Partial(bytes_loss)
        trainable = {"vector": {"u": jax.random.normal(jax.random.key(0), (2, 64)), "scale": jnp.ones(2)}}
        counts = batch.weights.sum(axis=1)
        assert len({*counts.tolist()}) > 3  # uneven
    else:
        policy, batch, loss, trainable = base, next(once(pairs, rows=2)), as_partial(preference().loss), adapter
    settings = (CALM.values(0, 2), CALM.values(1, 2))
    ends = {}
    for parts in (1, 2, 4)[: 3 if name == "bytes" else 2]:
        first, log = stepped(trainable, stacked(batch, parts), loss, settings[0], base=policy)
        last, _ = stepped(trainable, stacked(batch, parts), loss, *settings, base=policy)
        ends[parts] = (first_moment(first), leaves(last.trainable), log)
    for parts in list(ends)[1:]:
        for mine, want in zip(ends[parts][:2], ends[1][:2], strict=True):
            for key in want:
                np.testing.assert_allclose(mine[key], want[key], rtol=0, atol=1e-6, err_msg=key)
        for key, want in ends[1][2].items():
            np.testing.assert_allclose(ends[parts][2][key], want, rtol=1e-5, atol=1e-5, err_msg=key)
    assert max(np.abs(x).max() for x in ends[1][0].values()) > 1e-4


def test_the_first_step_by_hand(some):
    """m = (1 - b1) g, v = (1 - b2) g^2 and both corrected: x <- x - rate (g / (|g| + eps) + decay x)."""
    x = {"q": {"a": jnp.array([[[3.0, -0.5]]])}}
    state, log = stepped(x, some, Partial(quadratic), values(learning_rate=0.1, weight_decay=0.2, eps=0.25))
    want = [3.0 - 0.1 * (3 / 3.25 + 0.2 * 3.0), -0.5 - 0.1 * (-0.5 / 0.75 - 0.2 * 0.5)]
    np.testing.assert_allclose(state.trainable["q"]["a"][0, 0], want, rtol=1e-6)
    assert log == pytest.approx({"loss": 9.25 / 2, "gradient_norm": np.sqrt(9.25), "skipped": 0.0})
    assert int(state.step) == 1


def small(seed: int) -> dict:
    """An adapter-shaped tree of a few numbers."""
    a, b = (np.random.default_rng(seed + n).normal(size=(2, 3, 2)).astype(np.float32) for n in (0, 10))
    return jax.tree.map(jnp.asarray, {"q": {"a": a, "b": b, "scale": np.ones(2, np.float32)}, "vector": {"u": a[0]}})


def test_steps_agree_with_optax_adamw(some):
    x, target = small(0), small(1)
    optimizer = Optimizer(0.05, warmup=2, weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6, clip=1.5)
    steps = 6
    rates = lambda n: jnp.array([optimizer.rate(k, steps) for k in range(steps)])[n]  # noqa: E731
    mask = {"q": {"a": True, "b": True, "scale": False}, "vector": {"u": True}}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.5), optax.adamw(rates, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, mask=mask)
    )
    settings = [optimizer.values(n, steps) for n in range(steps)]
    state, _ = stepped(x, some, Partial(quadratic, target=target, hard=0.7), *settings)

    @jax.jit
    def their_step(x, moments):
        slope = jax.tree.map(lambda x, t: 0.7 * (x - t), x, target)
        updates, moments = theirs.update(slope, moments, x)
        return optax.apply_updates(x, updates), moments

    want, moments = x, theirs.init(x)
    for _ in range(steps):
        want, moments = their_step(want, moments)
    for key, value in leaves(want).items():
        np.testing.assert_allclose(leaves(state.trainable)[key], value, rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("clip,factor", [(0.0, 1.0), (10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_clipping_bounds_the_gradient_norm(some, clip, factor):
    """A gradient (3, 4) of norm 5; the log holds the norm before clipping."""
    x = {"q": {"a": jnp.array([[[3.0, 0.0]]]), "b": jnp.array([[[4.0]]])}}
    state, log = stepped(x, some, Partial(quadratic), values(clip=clip, b1=0.5))
    moment = first_moment(state)
    np.testing.assert_allclose(moment["['q']['a']"], [[[1.5 * factor, 0.0]]], rtol=1e-6)
    np.testing.assert_allclose(moment["['q']['b']"], [[[2.0 * factor]]], rtol=1e-6)
    assert log["gradient_norm"] == pytest.approx(5.0)


def test_learning_rates_by_hand():
    """Warm-up of 4 to 8: 2, 4, 6, 8; then over 8 steps from 8 to a tenth, by cosine or along a line."""
    at = lambda schedule, step, **more: Optimizer(8.0, warmup=4, schedule=schedule, **more).rate(step, 12)  # noqa: E731
    for schedule in ("cosine", "linear", "constant"):
        assert [at(schedule, n) for n in range(5)] == [2.0, 4.0, 6.0, 8.0, 8.0]
    np.testing.assert_allclose([at("linear", n) for n in (6, 8, 12)], [0.8 + 7.2 * x for x in (0.75, 0.5, 0.0)])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        [at("cosine", n) for n in (6, 8, 10, 12)], [0.8 + 3.6 * (1 + x) for x in (half, 0.0, -half, -1.0)]
    )
    assert [at("constant", n) for n in (5, 11)] == [8.0, 8.0]
    assert at("linear", 12, final=0.0) == 0.0 and at("cosine", 12, final=1.0) == 8.0
    assert Optimizer(8.0).rate(0, 1) == 8.0
    assert Optimizer(8.0, warmup=3).rate(2, 3) == 8.0  # warm-up alone


# Faults


def steep(policy, batch):
    """Finite at 0, where its slope is not."""
    return Loss(Mean(jnp.sum(jnp.sqrt(policy.adapter["q"]["a"])), ONE), {})


def spoilt(policy, batch, *, wrong):
    total = quadratic(policy, batch).total
    return Loss(Mean(total.sum + wrong, total.weight), {})


@pytest.mark.parametrize("what", ["nan", "inf", "slope"])
def test_a_step_that_is_not_finite_changes_nothing(what, some):
    x = {"q": {"a": jnp.zeros((1, 1, 2))}} if what == "slope" else small(2)
    loss = Partial(steep) if what == "slope" else Partial(spoilt, wrong=np.float32(what))
    before = start_state(x, jax.random.key(0))
    state, log = stepped(x, some, loss, values(weight_decay=0.1))
    assert same((before.trainable, before.optimizer), (state.trainable, state.optimizer))
    assert log["skipped"] == 1 and int(state.step) == 1


def poisoned(policy, batch, *, below):
    """Not a number when the batch holds a response whose number is below this."""
    return spoilt(policy, batch, wrong=jnp.where(jnp.any((batch.ids >= 0) & (batch.ids < below)), jnp.nan, 0.0))


def test_skipped_steps_are_counted_and_training_goes_on(data):
    x = small(3)
    done = stage(EMPTY, x, Objective(Partial(poisoned, below=1)), data["target"], Settings(8, rows=1, seed=1))
    skipped = [line["skipped"] for line in done.lines]
    assert 0 < sum(skipped) < 8
    assert [float(np.isnan(line["loss"])) for line in done.lines] == skipped
    assert all(np.isfinite(x).all() for x in leaves(done.trainable).values())
    assert not same(done.trainable, x)


def test_five_bad_steps_in_a_row_stop_the_run(data, tmp_path):
    objective = Objective(Partial(poisoned, below=99))
    with pytest.raises(BadInput, match=r"^bad: step 5: the loss was not finite 5 times in a row; lower") as error:
        stage(EMPTY, small(3), objective, data["target"], Settings(8, rows=1), folder=tmp_path, name="bad")
    assert MAX_SKIPPED == 5 and "\n" not in str(error.value)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "done.json").exists()


# What is compiled


def test_new_numbers_compile_nothing(base, adapter, pairs):
    batch = stacked(next(once(pairs, rows=2)))

    def loss(optimizer, objective, trainable):
        return stepped(trainable, batch, as_partial(objective.loss), optimizer.values(0, 9), base=base)[1]["loss"]

    first = loss(Optimizer(), preference(beta=0.1), adapter)
    compiled = train_step._cache_size()
    quick = Optimizer(3e-2, warmup=3, schedule="linear", weight_decay=0.1, b1=0.5, b2=0.9, eps=1e-4, clip=0.0)
    assert loss(quick, preference(beta=0.1), adapter) == first
    others = [
        loss(Optimizer(), preference(beta=0.7), adapter),
        loss(Optimizer(), preference(beta=0.1, label_smoothing=0.2), adapter),
        loss(Optimizer(), preference(beta=0.1), rescale(adapter, 2.0)),
    ]
    assert len({first, *others}) == 4
    assert train_step._cache_size() == compiled


# What is touched


def flat(policy, batch):
    """A loss whose gradient is zero, not missing."""
    sums = [jnp.sum(x) for x in jax.tree.leaves((policy.params, policy.adapter))]
    return Loss(Mean(0.0 * sum(sums), ONE), {})


def test_decay_shrinks_matrices_only(some):
    """At a zero gradient x <- x (1 - rate decay) for matrices and x <- x for norms, biases and scales."""
    params = jax.tree.map(jnp.ones, shapes(BIASED), is_leaf=lambda x: isinstance(x, tuple))
    state, _ = stepped(params, some, Partial(flat), values(learning_rate=0.5, weight_decay=0.2), full=True)
    ends = leaves(state.trainable)
    kept = {name for name, x in ends.items() if (x == 1).all()}
    assert kept == {name for name in ends if "norm" in name or name.endswith("['b']")}
    assert 0 < len(kept) < len(ends)
    assert all(np.allclose(x, 0.9) for name, x in ends.items() if name not in kept)
    x = small(0)
    state, _ = stepped(x, some, Partial(flat), values(learning_rate=0.5, weight_decay=0.2))
    for name, end in leaves(state.trainable).items():
        np.testing.assert_allclose(end, leaves(x)[name] * (1.0 if "scale" in name else 0.9), rtol=1e-6, err_msg=name)


def test_full_fine_tuning_moves_every_parameter(lm, base, data):
    """And leaves the caller's arrays, which the step's donated state began with, as they were."""
    before = jax.tree.map(np.array, lm.params)
    settings = Settings(2, Optimizer(1e-3, schedule="constant"), rows=1, full=True)
    done = stage(base, lm.params, sft(), data["target"], settings)
    assert same(before, lm.params)
    start, end = leaves(before), leaves(done.trainable)
    assert start.keys() == end.keys()
    assert [k for k in start if np.array_equal(start[k], end[k])] == []
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in end.values())


def test_an_adapter_leaves_the_base_bit_for_bit(lm, base, fresh, data):
    """And, of itself, its scales and the layer that it leaves alone."""
    before = jax.tree.map(np.array, lm.params)
    done = stage(base, fresh, sft(), data["target"], Settings(3, rows=1))
    assert same(before, lm.params) and same(before, base.params)
    start, end = leaves(fresh), leaves(done.trainable)
    for name in start:
        moved = (start[name] != end[name]).reshape(2, -1).any(axis=1)
        assert moved.tolist() == [False, "scale" not in name], name


def test_a_fresh_adapter_is_the_reference(base, fresh, adapter, pairs):
    """B = 0: the same log-probabilities bit for bit, so the DPO loss is ln 2 and its margin 0."""
    batch = next(once(pairs, rows=2))
    score = jax.jit(token_logprobs)
    assert not np.array_equal(score(attach(base, adapter, False), batch), score(base, batch))
    np.testing.assert_array_equal(score(attach(base, fresh, False), batch), score(base, batch))
    loss, asleep = as_partial(preference(beta=0.3).loss), rescale(adapter, 0.0)
    _, log = stepped(asleep, stacked(batch), loss, values(), base=base)
    np.testing.assert_allclose(log["loss"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(log["margin"], 0.0, atol=1e-3)


# The loop


def test_facts_do_not_depend_on_the_batches_they_were_made_in(base, data, pairs):
    other = prepared(preference(), base, data["pair"], rows=3, key=jax.random.key(0))
    assert other.tables.keys() == pairs.tables.keys() == {"preference", "reference_logps"}
    np.testing.assert_allclose(other.tables["reference_logps"], pairs.tables["reference_logps"], rtol=1e-5)
    assert prepared(sft(), base, data["target"], rows=2, key=jax.random.key(0)) is data["target"]


def test_a_stage_says_what_it_did_and_says_it_again(base, fresh, data, tmp_path):
    """With a folder and without: the same values bit for bit, and the log that it returns is the one it writes."""
    settings = Settings(3, Optimizer(1e-3, warmup=2), rows=1, checkpoint_every=2)
    plain = stage(base, fresh, sft(), data["target"], settings)
    kept = stage(base, fresh, sft(), data["target"], settings, folder=tmp_path)
    assert same(plain.trainable, kept.trainable)
    without_time = lambda lines: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]  # noqa: E731
    assert without_time(plain.lines) == without_time(kept.lines)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == kept.lines and [line["step"] for line in written] == [1, 2, 3]
    assert written[0].keys() >= {"loss", "cross_entropy", "gradient_norm", "skipped", "learning_rate", "tokens"}
    np.testing.assert_allclose([line["learning_rate"] for line in written], [5e-4, 1e-3, 1e-3], rtol=1e-6)
    assert kept.tokens == sum(line["tokens"] for line in written) > 0
    again = stage(base, fresh, sft(), data["target"], settings, folder=tmp_path)  # finished: read back
    assert same(again.trainable, kept.trainable) and again.lines == kept.lines and again.tokens == kept.tokens


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_waypoints_are_what_was_trained_by_then(where, base, fresh, data, tmp_path):
    folder = tmp_path if where == "folder" else None
    settings = Settings(4, Optimizer(1e-3, schedule="constant"), rows=1, waypoints=2)
    assert settings.marks == {2, 4} and replace(settings, steps=5).marks == {3, 5}
    assert replace(settings, waypoints=0).marks == set()
    trained = stage(base, fresh, sft(), data["target"], settings, folder=folder)
    half = stage(base, fresh, sft(), data["target"], replace(settings, steps=2, waypoints=0))
    assert list(trained.waypoints) == [2, 4]
    assert same(trained.waypoints[2], half.trainable) and same(trained.waypoints[4], trained.trainable)
    if folder is not None:
        again = stage(base, fresh, sft(), data["target"], settings, folder=folder)  # finished: read back
        assert same(again.waypoints, trained.waypoints)
        with pytest.raises(BadInput, match="another waypoints"):
            stage(base, fresh, sft(), data["target"], replace(settings, waypoints=4), folder=folder)


def test_the_loss_comes_down(base, fresh, data):
    settings = Settings(16, Optimizer(1e-2), rows=1)
    losses = [line["loss"] for line in stage(base, fresh, sft(), data["target"], settings).lines]
    assert np.mean(losses[-4:]) < losses[0] - 0.1
