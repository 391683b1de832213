"""Rewards: their fits against scikit-learn and by hand, grouped cross-validation, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from aif.batches import build, once
from aif.directions.probes import Rated
from aif.errors import BadInput
from aif.objectives import Context, Unfitted
from aif.objectives.grpo import Options as GrpoOptions
from aif.plugins import available, plugin
from aif.rewards import bradley_terry as pairwise
from aif.rewards import ratings
from aif.rewards.heads import Head, HeadOptions, fit_head, linear
from aif.slots import response_means

RNG = np.random.default_rng(0)
PROMPTS = np.repeat(np.arange(24), 4)
LIKED = np.tile([True, False, False, False], 24)


def world(signal: float) -> Rated:
    """24 prompts with four answers of two layers: prompts differ widely; in layer 1 a coordinate tells the target."""
    rng = np.random.default_rng(1)
    means = rng.normal(size=(96, 2, 12)) + 5 * rng.normal(size=(24, 1, 12))[PROMPTS]
    means[:, 1, 3] += signal * LIKED
    levels = np.stack([3 * LIKED, LIKED + rng.integers(0, 2, 96)], axis=1)
    return Rated(means.astype(np.float32), levels, PROMPTS, LIKED)


def context(data: Rated) -> Context:
    return Context(
        ("warmth", "wit"),
        tuple("abcd"),
        data.levels,
        data.levels[data.liked],
        liked=data.liked,
        prompts=data.prompts,
        rated=lambda: data,
    )


# Fits


def test_bradley_terry_by_hand():
    """Equal rewards: ln 2, with slope -1/2; a lead equal to the margin too; centring adds c (r_c + r_r)^2."""
    one = jnp.float32(1.5)
    np.testing.assert_allclose(pairwise.bradley_terry(one, one), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(pairwise.bradley_terry(one, one - 0.7, margin=0.7), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(pairwise.bradley_terry(one, one, centre=0.1), np.log(2) + 0.9, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(pairwise.bradley_terry)(one, one), -0.5, rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 20.0])
def test_the_pairwise_fit_is_a_logistic_regression(penalty):
    """scikit-learn's, without intercept, on differences of either sign; the slope of the loss is 0 there."""
    d = RNG.normal(size=(60, 7)) + 0.8
    sign = np.where(np.arange(60) % 2, 1.0, -1.0)
    theirs = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        d * sign[:, None], sign
    )
    mine = pairwise.fit_pairs(d, penalty)
    np.testing.assert_allclose(mine, theirs.coef_[0], atol=1e-5)
    chosen = lambda w: jnp.sum(pairwise.bradley_terry(d @ w, jnp.zeros(60))) + penalty / 2 * jnp.sum(w**2)  # noqa: E731
    np.testing.assert_allclose(jax.grad(chosen)(jnp.float32(mine)), 0.0, atol=1e-3)


def test_ridge_is_scikit_learns():
    z = RNG.normal(size=(50, 6))
    z -= z.mean(axis=0)
    y = z @ RNG.normal(size=6) + RNG.normal(size=50) + 4
    np.testing.assert_allclose(ratings.ridge(z, y, 3.0), Ridge(alpha=3.0).fit(z, y).coef_, atol=1e-8)


def test_composite_by_hand():
    """Levels 0..3, weights 2 and -1: (2 * 3 - 1 * 1) / 3 / 3; an unrated dimension is left out; none at all is NaN."""
    got = ratings.composite(np.array([[3, 1], [3, -1], [-1, -1]]), np.array([2.0, -1.0]), 3)
    np.testing.assert_allclose(got, [5 / 9, 1.0, np.nan])


def test_pairs_are_of_one_prompt():
    got = pairwise.pairs_of(np.array([False, True, False, False]), np.array([0, 0, 0, 1]))
    assert got.tolist() == [[1, 0], [1, 2]]


# Cross-validation


@pytest.mark.parametrize("name", ["bradley_terry", "ratings"])
def test_a_signal_is_found_where_it_is_and_nothing_where_there_is_none(name):
    """Held-out accuracy of ordering a prompt's answers: high with a signal in layer 1, at chance on shuffled labels."""
    module, options = plugin("rewards", name, {"layers": [0, 1], "folds": 4}, "reward")
    about = module.make(options, context(world(4.0))).about
    assert about["layer"] == 1 and about["prompts"] == 24
    accuracy = about["held_out"]["accuracy"]
    assert accuracy["value"] > 0.7 and len(accuracy["folds"]) == 4
    assert abs(about["shuffled_labels"]["accuracy"] - 0.5) < 0.25
    if name == "bradley_terry":
        nothing = module.make(options, context(world(0.0))).about
        assert abs(nothing["held_out"]["accuracy"]["value"] - 0.5) < 0.25


def test_a_held_out_prompt_is_not_in_its_fit():
    """A task that returns which responses it saw: none of a fold's prompts is among those it is judged by."""
    data = world(1.0)
    seen: list[np.ndarray] = []

    def fit(z, numbers, penalty):
        seen.append(data.prompts[numbers])
        return np.zeros(z.shape[1])

    from aif.directions.probes import folds_of
    from aif.rewards.heads import Task, held_out

    fold = folds_of(data.prompts, 4, 0)
    held_out(data.means[:, 0], fold, Task(fit, lambda r: 0.0, lambda r, m: {}), 1.0)
    for k, prompts in enumerate(seen):
        assert set(prompts) == set(data.prompts[fold != k]) and not set(prompts) & set(data.prompts[fold == k])


def test_a_head_reads_the_reference_as_it_was_fitted(base, lm, rows):
    """The reward from the tap of a forward pass is the head on the mean residuals; empty slots get 0."""
    batch = jax.tree.map(
        jnp.asarray, next(once(build(rows, lm.tokenizer, which="all", length=384, target="x"), rows=2))
    )
    w = RNG.normal(size=base.config.width)
    reward = linear(Head(1, w, 0.3), {})
    assert reward.watch is response_means
    taps = base(batch, tap=response_means(batch)).taps
    got = np.asarray(reward.score(taps, batch))
    there = np.asarray(batch.ids) >= 0
    np.testing.assert_allclose(got[there], (np.asarray(taps)[1] @ w + 0.3)[there], rtol=1e-4, atol=1e-4)
    assert (got[~there] == 0).all() and not there.all()


def test_the_mean_reward_of_the_answers_it_was_fitted_on_is_zero():
    data = world(2.0)
    head, _ = fit_head(data, pairwise.task_of(pairwise.pairs_of(data.liked, data.prompts)), HeadOptions(folds=3))
    np.testing.assert_allclose((data.means[:, head.layer] @ head.weights + head.bias).mean(), 0.0, atol=1e-5)


# What is refused


def test_what_cannot_be_rewarded_is_refused_before_there_is_a_model():
    data = world(1.0)
    blind = Context(("warmth", "wit"), tuple("abcd"), data.levels, data.levels, liked=data.liked, prompts=data.prompts)
    alone = context(data._replace(liked=np.ones(96, bool)))
    unrated = context(data._replace(levels=np.full((96, 2), -1)))
    make = lambda name, context, **options: plugin("rewards", name, options, "reward")[0].make(  # noqa: E731
        plugin("rewards", name, options, "reward")[1], context
    )
    with pytest.raises(BadInput, match="0 training prompts have a target answer and another one, and 5 folds"):
        make("bradley_terry", alone)
    with pytest.raises(BadInput, match="24 training prompts .* 30 folds need as many"):
        make("bradley_terry", context(data), folds=30)
    with pytest.raises(BadInput, match="0 training prompts have rated answers"):
        make("ratings", unrated)
    with pytest.raises(BadInput, match="weights.wiit: .* did you mean 'wit'"):
        make("ratings", context(data), weights={"wiit": 1.0})
    with pytest.raises(BadInput, match="layer 7 is out of range; the model has layers 0..1"):
        make("ratings", context(data), layers=[7])
    for name in ("bradley_terry", "ratings"):
        with pytest.raises(Unfitted):
            make(name, blind)


def test_grpo_checks_its_reward():
    assert available("rewards") == ["bradley_terry", "pragmatic", "ratings"]
    with pytest.raises(ValueError, match="no reward is called 'bradley', did you mean 'bradley_terry'"):
        GrpoOptions.model_validate({"reward": {"name": "bradley"}})
    with pytest.raises(ValueError, match="`ratings` knows the corpus's answers only"):
        GrpoOptions.model_validate({"reward": {"name": "pragmatic", "reader": {"name": "ratings"}}})
