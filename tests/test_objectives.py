"""Objectives: their arithmetic against hand values and TRL, and the contract suite over all of them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import digamma

from aif import testing
from aif.api import load_config
from aif.corpus.tiers import Tiers, scores, target_of, tiers
from aif.errors import BadInput
from aif.experiment import Experiment
from aif.objectives import Context, Objective
from aif.objectives import efe as efe_file
from aif.objectives.dpo import dpo, pairs, preference
from aif.objectives.efe import efe, group_log_softmax, policy_divergence
from aif.objectives.logprobs import response_logprobs
from aif.objectives.sft import cross_entropy, sft
from aif.objectives.terms import terms_of
from aif.preferences import empirical, normalise
from aif.readers.ratings import ratings, reliability
from aif.types import Batch, Loss, Mean


def slots(group, **extras) -> Batch:
    """A batch of one row whose response slots belong to these prompts (-1 is empty); nothing else in it is read."""
    group = jnp.array([group])
    blank = jnp.zeros((1, 1), int)
    ids = jnp.where(group >= 0, jnp.arange(group.shape[1]), -1)
    tables = {name: jnp.asarray(x)[None] for name, x in extras.items()}
    return Batch(blank, blank, blank, blank, blank, blank, blank.astype(float), blank, group, ids, tables)


# Cross-entropy


def test_cross_entropy_by_hand():
    """- (1 ln 1/2 + 2 ln 1/4) / 3 = 5 ln 2 / 3; the token of weight 0 counts nothing."""
    got = cross_entropy(jnp.log(jnp.array([0.5, 0.25, 0.1])), jnp.array([1.0, 2.0, 0.0]))
    np.testing.assert_allclose(got.value, 5 * np.log(2) / 3, rtol=1e-6)
    np.testing.assert_allclose(got.weight, 3.0)


def test_a_mean_of_nothing_is_zero():
    assert float(Mean(jnp.float32(0), jnp.float32(0)).value) == 0.0


# Direct preference optimisation


def test_dpo_by_hand():
    """At the reference every loss is ln 2, and its slope by the chosen log-probability is -beta / 2."""
    zeros = jnp.zeros(3)
    np.testing.assert_allclose(dpo(zeros, zeros, zeros, zeros, beta=0.3), np.log(2), rtol=1e-6)
    slope = jax.grad(lambda c: dpo(c, zeros, zeros, zeros, beta=0.3).sum())(zeros)
    np.testing.assert_allclose(slope, -0.15, rtol=1e-6)
    one = jnp.full(3, 2.0)
    np.testing.assert_allclose(dpo(one, zeros, zeros, zeros, beta=0.3, variant="hinge"), 0.4, rtol=1e-6)
    np.testing.assert_allclose(dpo(one, zeros, zeros, zeros, beta=0.25, variant="ipo"), 0.0, atol=1e-12)
    flipped = dpo(one, zeros, zeros, zeros, beta=0.25, variant="ipo", label_smoothing=0.25)
    np.testing.assert_allclose(flipped, 0.25 * 16, rtol=1e-6)


def test_pairs_are_taken_by_prompt():
    """Slots of prompts 1, 0, 0, 1 and an empty one, in no order."""
    batch = slots([1, 0, 0, 1, -1], preference=[-1.0, 1.0, -1.0, 1.0, 0.0])
    chosen, rejected, present = pairs(jnp.array([[10.0, 20.0, 30.0, 40.0, 99.0]]), batch)
    np.testing.assert_array_equal(chosen[0, :2], [20.0, 40.0])
    np.testing.assert_array_equal(rejected[0, :2], [30.0, 10.0])
    np.testing.assert_array_equal(present, [[True, True, False, False, False]])


# Expected free energy over candidates


def test_policy_divergence_of_two_is_dpo():
    """K = 2, G = (0, large): KL((1, 0) || softmax(r)) = -ln sigmoid(r_1 - r_2), and so are its slopes."""
    policy, reference = jnp.array([[-3.0, -5.0]]), jnp.array([[-4.5, -3.5]])
    G, batch = jnp.array([[0.0, 1e6]]), slots([0, 0])
    mine = lambda p: policy_divergence(G, p - reference, batch, 1.0)  # noqa: E731
    theirs = lambda p: dpo(p[0, 0], p[0, 1], reference[0, 0], reference[0, 1], beta=1.0)  # noqa: E731
    for x in (policy, policy[:, ::-1], reference):
        (a, da), (b, db) = jax.value_and_grad(mine)(x), jax.value_and_grad(theirs)(x)
        np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_allclose(da, db, rtol=1e-6, atol=1e-7)
    assert np.isfinite(policy_divergence(jnp.array([[0.0, jnp.inf]]), policy, batch, 1.0))


def test_policy_divergence_by_hand():
    """Two prompts and an empty slot: the sum of two explicit KL divergences; equal tilts give 0."""
    G, r = np.array([0.3, -1.0, 0.7, 2.0, 0.1, 9.0]), np.array([0.5, 0.2, -1.0, 0.3, 0.9, 5.0])
    groups = [0, 1, 0, 1, 1, -1]
    want = 0.0
    for members in ([0, 2], [1, 3, 4]):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (-1.7 * G[members], r[members]))
        want += (p * np.log(p / q)).sum()
    got = policy_divergence(jnp.float32(G)[None], jnp.float32(r)[None], slots(groups), 1.7)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    same = policy_divergence(jnp.float32(G)[None], jnp.float32(-1.7 * G)[None], slots(groups), 1.7)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_group_log_softmax_leaves_empty_slots_alone():
    got = group_log_softmax(jnp.array([[1.0, 2.0, 3.0, 7.0]]), slots([0, 0, 1, -1]))
    np.testing.assert_allclose(got, [[-np.log1p(np.e), 1 - np.log1p(np.e), 0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("precision", [0.5, 3.0])
def test_descent_ends_at_the_policy_posterior(precision):
    """A policy that is a softmax over six logits: the minimum of the divergence is E exp(-precision G), normalised."""
    K = 6
    G, habit, start = (jax.random.normal(k, (K,)) for k in jax.random.split(jax.random.key(0), 3))
    log_E, batch = jax.nn.log_softmax(2 * habit), slots([0] * K)

    def loss(theta):
        return policy_divergence(G[None], (jax.nn.log_softmax(theta) - log_E)[None], batch, precision)

    step = lambda theta, _: (theta - 1.0 * jax.grad(loss)(theta), None)  # noqa: E731
    theta = jax.jit(lambda x: jax.lax.scan(step, x, None, length=4000)[0])(start)
    want = np.exp(np.asarray(log_E, np.float64) - precision * np.asarray(G, np.float64))
    want /= want.sum()
    variation = np.abs(np.asarray(jax.nn.softmax(theta)) - want).sum() / 2
    assert variation <= 1e-3
    assert np.abs(np.asarray(jax.nn.softmax(start)) - want).sum() / 2 > 0.1


def entropy(p):
    return -(p * np.log(p)).sum()


def test_terms_of_one_dimension_by_hand(base):
    """Two levels, agreement 0.8, 10 counts a state, a rating of level 1, P(o|C) = (0.1, 0.9):

    Q(s) = (0.2, 0.8), Q(o) = (0.32, 0.68), U = 0.32 ln 0.1 + 0.68 ln 0.9, I_s = H(0.32, 0.68) - H(0.8, 0.2),
    I_p = sum_os Q(o) Q(s) (ln 10/a + psi(a + 1) - psi(11)) with a = 8 on the diagonal and 2 off it.
    """
    C = jnp.log(jnp.array([[0.1, 0.9]]))
    batch = slots([0], ratings=[[1]])
    reading = ratings(1, 2, agreement=0.8, strength=10.0).read(None, batch)
    np.testing.assert_allclose(reading.states[0, 0, 0], [0.2, 0.8], rtol=1e-6)
    got = terms_of(reading, C)
    qo, qs = np.array([0.32, 0.68]), np.array([0.2, 0.8])
    a = np.array([[8.0, 2.0], [2.0, 8.0]])
    np.testing.assert_allclose(got["pragmatic"], [[0.32 * np.log(0.1) + 0.68 * np.log(0.9)]], rtol=1e-5)
    np.testing.assert_allclose(got["state_gain"], [[entropy(qo) - entropy(np.array([0.8, 0.2]))]], rtol=1e-5)
    np.testing.assert_allclose(
        got["parameter_gain"], [[qo @ (np.log(10 / a) + digamma(a + 1) - digamma(11)) @ qs]], rtol=1e-5
    )


def test_a_rating_is_read_by_bayes(base):
    """Three levels, agreement 0.8: P(o=0|s) = (0.8, 0.1, 0), P(o=1|s) = (0.2, 0.8, 0.2), normalised over states."""
    reading = ratings(2, 3, agreement=0.8).read(None, slots([0, 0, -1], ratings=[[0, 1], [1, -1], [2, 2]]))
    first, middle = np.array([8, 1, 0]) / 9, np.array([1, 4, 1]) / 6
    np.testing.assert_allclose(reading.states[0, 0], [first, middle], rtol=1e-6)
    np.testing.assert_allclose(reading.states[0, 1, 0], middle, rtol=1e-6)
    np.testing.assert_array_equal(reading.known, [[[1, 1], [1, 0], [0, 0]]])
    np.testing.assert_allclose(reading.pA, 16 * reading.A, rtol=1e-6)


def prepared_efe(base, table, C, **options):
    """G and its terms for one prompt with these ratings per response."""
    S, O = C.shape
    objective = efe(ratings(S, O, agreement=0.8), C, **options)
    batch = slots([0] * len(table), ratings=jnp.array(table, int), reference_logps=jnp.zeros(len(table)))
    return objective.prepare(base, batch, jax.random.key(0))


def test_G_is_minus_the_weighted_terms(base):
    C = normalise(jax.random.normal(jax.random.key(0), (3, 4)))
    table = [[0, 1, 3], [2, 2, 0]]
    facts = prepared_efe(base, table, C, state_weight=0.7, parameter_weight=0.4)
    want = -(facts["pragmatic"] + 0.7 * facts["state_gain"] + 0.4 * facts["parameter_gain"])
    np.testing.assert_allclose(facts["G"], want, rtol=1e-6)
    assert facts["G"].shape == (1, 2) and (np.asarray(facts["state_gain"]) > 0).all()


def test_a_missing_rating_counts_nothing(base):
    """Unrated dimensions give the terms of the scale without them; a response with no rating has G = 0."""
    C = normalise(jax.random.normal(jax.random.key(1), (3, 4)))
    part = prepared_efe(base, [[0, -1, 3], [-1, -1, -1]], C, parameter_weight=0.5)
    want = prepared_efe(base, [[0, 3]], C[jnp.array([0, 2])], parameter_weight=0.5)
    for name in ("G", "pragmatic", "state_gain", "parameter_gain"):
        np.testing.assert_allclose(part[name][0, 0], want[name][0, 0], rtol=1e-6)
        assert float(part[name][0, 1]) == 0.0


def test_reliability_and_preferences_by_hand():
    """An end level errs only inwards, a middle one to both sides; counts (1, 1, 0, 0) + 1 of dimension 0."""
    np.testing.assert_allclose(reliability(3, 0.8), [[0.8, 0.1, 0.0], [0.2, 0.8, 0.2], [0.0, 0.1, 0.8]], rtol=1e-6)
    C = empirical(np.array([[0, 3], [1, -1], [-1, -1]]), 4, smoothing=1.0)
    np.testing.assert_allclose(np.exp(C), [[2 / 6, 2 / 6, 1 / 6, 1 / 6], [1 / 5, 1 / 5, 1 / 5, 2 / 5]], rtol=1e-6)


def test_the_terms_that_efe_logs(base, lm, rows):
    """At the habit itself r = 0: q is uniform, KL to the habit is 0, the entropy ln K, G its mean over candidates."""
    from aif.batches import build, once

    dimensions = sorted(rows[0].candidates[0].ratings)
    data = build(rows[:2], lm.tokenizer, which="all", length=448, target="discernment", dimensions=dimensions)
    batch = next(once(data, rows=1))
    C = normalise(jax.random.normal(jax.random.key(2), (len(dimensions), 4)))
    objective = efe(ratings(len(dimensions), 4), C, precision=0.8)
    facts = jax.jit(objective.prepare)(base, batch, jax.random.key(0))
    loss = jax.jit(objective.loss)(base, batch._replace(extras={**batch.extras, **facts}))
    filled = batch.ids >= 0
    G = np.asarray(facts["G"], np.float64)[filled].reshape(2, 4)
    p = np.exp(-0.8 * G) / np.exp(-0.8 * G).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss.total.weight, 2.0, rtol=1e-5)
    np.testing.assert_allclose(loss.total.value, (p * np.log(4 * p)).sum() / 2, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(loss.terms["kl_habit"].value, 0.0, atol=1e-4)
    np.testing.assert_allclose(loss.terms["entropy"].value, np.log(4), atol=1e-4)
    np.testing.assert_allclose(loss.terms["G"].value, G.mean(), rtol=1e-4)


def context(levels_seen) -> Context:
    return Context(("warmth", "wit"), ("low", "high"), np.array(levels_seen), np.array(levels_seen))


def test_preferences_from_a_config():
    options = efe_file.Options(preferences={"warmth": [0.0, 1.0], "default": [2.0, 2.0]})
    made = efe_file.make(options, context([[0, 1]]))
    C = np.asarray(made.prepare.keywords["evaluate"].keywords["C"])
    np.testing.assert_allclose(C, [[-np.log1p(np.e), 1 - np.log1p(np.e)], [-np.log(2)] * 2], rtol=1e-6)
    for wrong, message in (
        ({"wamth": [0, 1]}, "no such dimension"),
        ({"wit": [0, 1, 2]}, "3 numbers for the 2 levels"),
    ):
        with pytest.raises(BadInput, match=message):
            efe_file.make(efe_file.Options(preferences=wrong), context([[0, 1]]))
    with pytest.raises(BadInput, match="this corpus has none"):
        efe_file.make(efe_file.Options(), context([[-1, -1]]))


def test_preferences_from_a_tier():
    """Three prompts with a target and another answer each; the first two are in the high tier: levels 0, 1 and 1, 1."""
    levels = np.array([[0, 1], [1, 0], [1, 1], [0, 0], [0, 0], [1, 1]])
    about = {"liked": np.array([True, False] * 3), "prompts": np.array([0, 0, 1, 1, 2, 2])}
    seen = Context(("warmth", "wit"), ("low", "high"), levels, levels[::2], **about)
    sorted_rows = replace(seen, tiers=lambda: np.array(["high", "high", "broad"])[seen.prompts])
    options = efe_file.Options(preferences={"tier": "high"})
    C = np.asarray(efe_file.make(options, sorted_rows).prepare.keywords["evaluate"].keywords["C"])
    np.testing.assert_allclose(np.exp(C), [[1 / 2, 1 / 2], [1 / 4, 3 / 4]], rtol=1e-6)
    with pytest.raises(BadInput, match="of the mid tier is rated"):
        efe_file.make(efe_file.Options(preferences={"tier": "mid"}), sorted_rows)
    with pytest.raises(BadInput, match="no rows to sort into tiers"):
        efe_file.make(options, seen)


def test_a_config_takes_preferences_from_a_tier():
    """The rows that `aif corpus score` calls high, and no others."""
    experiment = Experiment(load_config("configs/tiny.yaml", ["arms.efe.objective.preferences.tier=high"]))
    rows = experiment.rows("train", "")
    scale, rule = experiment.scale, Tiers()
    found = tiers([s.score for s in scores(rows, scale, rule, "discernment")], rule)
    assert 0 < found.count("high") < len(found)
    told = [target_of(r, "discernment").ratings for r, t in zip(rows, found, strict=True) if t == "high"]
    levels = np.array([[r.get(d.id, -1) for d in scale.dimensions] for r in told])
    made = experiment.objective(experiment.config.arms["efe"])
    np.testing.assert_allclose(made.prepare.keywords["evaluate"].keywords["C"], empirical(levels, len(scale.levels)))


# The contract


def _margin(policy, batch):
    """A custom objective: squared mean log-probability of each response."""
    values = jnp.where(batch.ids >= 0, jnp.square(response_logprobs(policy, batch) / 100), 0.0)
    n = jnp.sum(batch.ids >= 0).astype(jnp.float32)
    return Loss(Mean(jnp.sum(values), n), {"square": Mean(jnp.sum(values), n)})


def make_efe():
    return efe(ratings(15, 4), normalise(jax.random.normal(jax.random.key(3), (15, 4))), precision=1.0)


OBJECTIVES = {
    "sft": sft,
    "dpo": lambda: preference(beta=0.1, label_smoothing=0.1),
    "ipo": lambda: preference(beta=0.5, variant="ipo", reference_free=True),
    "efe": make_efe,
    "custom": lambda: Objective(_margin, responses="all"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_keep_the_contract(name, lm):
    testing.check(OBJECTIVES[name](), lm)


def test_the_contract_runs_on_its_own_model():
    testing.check(sft())


def _broken(change):
    def loss(policy, batch):
        constant = cross_entropy(jnp.full_like(batch.weights, -0.7), batch.weights)
        return change(sft().loss(policy, batch), constant, batch)

    return Objective(loss, name="mine")


BROKEN = {
    "not finite": lambda scored, constant, batch: Loss(Mean(scored.total.sum * jnp.nan, scored.total.weight), {}),
    "returns Mean; return Loss": lambda scored, constant, batch: scored.total,
    "term 'x' is float": lambda scored, constant, batch: Loss(scored.total, {"x": 1.0}),
    "gradient is zero": lambda scored, constant, batch: Loss(constant, {}),
    "weight 0.0": lambda scored, constant, batch: Loss(Mean(scored.total.sum, jnp.float32(0)), {}),
    "do not add up": lambda scored, constant, batch: Loss(Mean(scored.total.value, jnp.float32(1)), {}),
    "not free": lambda scored, constant, batch: Loss(
        scored.total, {"rows": Mean(scored.total.sum, jnp.float32(batch.ids.shape[0]))}
    ),
    "fails under jax.jit": lambda scored, constant, batch: Loss(Mean(float(scored.total.sum), jnp.float32(1)), {}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_the_contract_finds_what_is_broken(message, lm):
    with pytest.raises(AssertionError, match=message):
        testing.check(_broken(BROKEN[message]), lm)


def test_the_contract_reads_prepared_facts(lm):
    wrong = Objective(sft().loss, lambda reference, batch, key: {"score": batch.weights}, name="mine")
    with pytest.raises(AssertionError, match="'score' has shape .* per response slot"):
        testing.check(wrong, lm)
