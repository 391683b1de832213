"""p-values, their correction, and the questions that they answer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import stats

from aif.basins import Measured, ratio
from aif.basins.efficiency import minimum
from aif.config import check
from aif.errors import BadInput
from aif.questions import answers, verdict_of
from aif.results import Difference
from aif.statistics import adjusted, contributions, difference, sign_flip


def measured(value, subject, rows, seed=0, better="higher", quantity="q") -> Measured:
    fields = {"metric": "m", "quantity": quantity, "unit": "u", "control": False, "row_name": "rows"}
    return Measured(**fields, better=better, subject=subject, seed=seed, rows=rows, value=value)


def mean_of(x, subject, **other) -> Measured:
    return measured(ratio(np.asarray(x, float), np.ones(len(x))), subject, len(x), **other)


# What a row brings


def test_the_contributions_to_a_mean_are_the_rows_own_values():
    """n m - (n - 1) (n m - x_i) / (n - 1) = x_i; over seeds, their mean."""
    x = np.random.default_rng(0).normal(size=(2, 9))
    np.testing.assert_allclose(contributions([mean_of(x[0], "a")]), x[0], atol=1e-12)
    np.testing.assert_allclose(
        contributions([mean_of(x[0], "a"), mean_of(x[1], "a", seed=1)]), x.mean(axis=0), atol=1e-12
    )


def test_the_contributions_to_a_ratio_are_its_first_order():
    """r + (s_i - r t_i) / mean(t), up to 1/n; their mean is near r."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 60, 200).astype(float)
    sums = tokens * rng.normal(3.0, 0.4, 200)
    r = sums.sum() / tokens.sum()
    got = contributions([measured(ratio(sums, tokens), "a", 200)])
    np.testing.assert_allclose(got, r + (sums - r * tokens) / tokens.mean(), rtol=0, atol=0.02)
    np.testing.assert_allclose(got.mean(), r, rtol=1e-4)


def test_the_contributions_to_a_minimum_are_those_to_its_point():
    rng = np.random.default_rng(2)
    tokens, sums = np.ones(30), rng.normal([3.0, 1.0, 2.0], 0.1, (30, 3))
    got = contributions([measured(partial(minimum, sums=sums, tokens=tokens), "a", 30)])
    np.testing.assert_allclose(got, sums[:, 1], atol=1e-9)


# Sign flips


def test_few_rows_are_flipped_in_every_way():
    """Five differences of one sign: 2 of 32 sign patterns are as extreme. With one against: |sum| >= 13 in 4 of 32."""
    assert sign_flip(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 0) == 2 / 32
    assert sign_flip(np.array([-1.0, 2.0, 3.0, 4.0, 5.0]), 0) == 4 / 32


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_sign_flips_agree_with_scipys_paired_permutation_of_two_samples(shift):
    """Swapping arm and baseline on a row flips its difference; scipy swaps, here signs are flipped."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(shift, 1, 10), rng.normal(0, 1, 10)
    want = stats.permutation_test(
        (x, y), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    np.testing.assert_allclose(sign_flip(x - y, 0), want.pvalue, atol=1e-12)


def test_many_rows_agree_with_the_t_test():
    d = np.random.default_rng(4).normal(0.15, 1.0, 200)
    np.testing.assert_allclose(sign_flip(d, 0), stats.ttest_1samp(d, 0).pvalue, atol=0.01)
    assert sign_flip(d, 0) == sign_flip(d, 0)


def test_nothing_is_never_significant():
    assert sign_flip(np.zeros(12), 0) == sign_flip(np.ones(1), 0) == sign_flip(np.array([1.0, np.nan]), 0) == 1.0


# Correction


def test_correction_by_hand():
    """p_(k) m / k, made monotone from the largest: .01 * 4, .02 * 4/2, .03 * 4/3, .5."""
    np.testing.assert_allclose(adjusted([0.5, 0.01, 0.03, 0.02]), [0.5, 0.04, 0.04, 0.04])
    assert adjusted([]) == []


def test_a_table_is_corrected_as_one():
    """Every difference of the table counts, what a question asks beside it too."""
    rng = np.random.default_rng(5)
    rows = {arm: rng.normal(shift, 1, 40) for arm, shift in (("base", 0), ("a", 0.2), ("b", 0.8))}
    list_ = [mean_of(x, arm) for arm, x in rows.items()]
    table = difference(list_, "base", ["base", "a", "b"], 200, 0, [("m", "q", "a", "b"), ("m", "nope", "a", "b")])
    assert [(d.arm, d.baseline) for d in table] == [("a", "base"), ("b", "base"), ("a", "b")]
    want = [sign_flip(rows[d.arm] - rows[d.baseline], 0) for d in table]
    np.testing.assert_allclose([d.p for d in table], want)
    np.testing.assert_allclose([d.p_adjusted for d in table], stats.false_discovery_control(want))


def test_only_seeds_that_both_arms_have_are_compared():
    list_ = [mean_of(np.full(4, v), arm, seed=s) for arm, s, v in (("a", 0, 1.0), ("a", 1, 9.0), ("b", 0, 3.0))]
    (d,) = difference(list_, "b", ["a"], 50, 0)
    assert (d.value, d.seeds, d.label) == (-2.0, [0], "single seed")


# Questions


def found(low, high, p=0.01, seeds=(0, 1, 2)) -> Difference:
    fields = {"metric": "efficiency", "quantity": "minimum loss", "unit": "nats/token", "arm": "efe", "baseline": "dpo"}
    verdict = {"verdict": "no difference shown", "label": "measured"}
    return Difference(
        **fields, value=(low + high) / 2, low=low, high=high, p=p, p_adjusted=p, seeds=[*seeds], **verdict
    )


@pytest.mark.parametrize(
    "low,high,p,direction,minimum,verdict",
    [
        (0.2, 0.4, 0.01, "higher", 0.1, "supported"),
        (0.2, 0.4, 0.06, "higher", 0.1, "inconclusive"),  # the interval alone is not enough
        (0.05, 0.4, 0.01, "higher", 0.1, "inconclusive"),
        (0.01, 0.08, 0.01, "higher", 0.1, "contradicted"),  # a difference, but too small a one
        (-0.4, -0.2, 0.01, "higher", 0.1, "contradicted"),
        (-0.4, -0.2, 0.01, "lower", 0.1, "supported"),
        (0.2, 0.4, 0.01, "lower", 0.0, "contradicted"),
        (-0.1, 0.1, 0.9, "lower", 0.0, "inconclusive"),
    ],
)
def test_the_rule(low, high, p, direction, minimum, verdict):
    got, reason = verdict_of(found(low, high, p), direction, minimum)
    assert got == verdict and f"{minimum:g}" in reason
    single, reason = verdict_of(found(low, high, p, seeds=[0]), direction, minimum)
    assert single == ("inconclusive" if verdict == "inconclusive" else "single seed")
    assert single == "inconclusive" or f"over rows alone this is {verdict}" in reason


CONFIG = {
    "arms": {name: {"objective": {"name": name}, "steps": 1} for name in ("sft", "dpo", "efe")},
    "baseline": "dpo",
    "measure": {"efficiency": {}, "stability": {}},
}
ASKED = {"metric": "efficiency", "quantity": "minimum loss", "arm": "efe", "direction": "lower"}


def test_answers_are_in_the_order_of_the_questions():
    config = check(
        {**CONFIG, "questions": [{**ASKED, "id": "low"}, {**ASKED, "baseline": "sft", "minimum_effect": 0.5}]}
    )
    one, two = answers(config, [found(-0.4, -0.2)])
    assert (one.id, one.verdict, one.baseline, one.unit, one.low) == ("low", "supported", "dpo", "nats/token", -0.4)
    assert (two.verdict, two.baseline, two.value, two.minimum_effect) == ("inconclusive", "sft", None, 0.5)
    assert two.id == "efficiency: minimum loss, efe against sft" and "not measured" in two.reason


def test_a_question_may_name_the_solution_that_a_pair_is_measured_with():
    asked = {"metric": "geometry", "quantity": "cosine with dpo", "arm": "efe", "baseline": "sft", "direction": "lower"}
    measure = {**CONFIG["measure"], "geometry": {}}
    assert check({**CONFIG, "measure": measure, "questions": [asked]}).questions[0].quantity == "cosine with dpo"
    with pytest.raises(BadInput, match="geometry has no number 'cosine with dpx', did you mean 'cosine with dpo'"):
        check({**CONFIG, "measure": measure, "questions": [{**asked, "quantity": "cosine with dpx"}]})


@pytest.mark.parametrize(
    "change,said",
    [
        ({"metric": "stabilty"}, "questions.1.metric: nothing here is called 'stabilty', did you mean 'stability'?"),
        ({"metric": "generality"}, "questions.1.metric: nothing here is called 'generality'"),
        ({"quantity": "minimum los"}, "questions.1.quantity: efficiency has no number 'minimum los', did you mean"),
        ({"quantity": "gain lost"}, "it has minimum loss, norm at the minimum, gain at the common norm"),
        ({"arm": "rlhf"}, "questions.1.arm: nothing here is called 'rlhf'; there are sft, dpo, efe"),
        ({"baseline": "spt"}, "questions.1.baseline: nothing here is called 'spt', did you mean 'sft'?"),
        ({"arm": "dpo"}, "questions.1.arm: 'dpo' cannot be compared with itself"),
        ({"direction": "better"}, "questions.1.direction: Input should be 'higher' or 'lower'"),
        ({"minimum_effect": -1}, "questions.1.minimum_effect: Input should be greater than or equal to 0"),
    ],
)
def test_questions_that_cannot_be_answered(change, said):
    with pytest.raises(BadInput) as error:
        check({**CONFIG, "questions": [ASKED, {**ASKED, **change}]})
    assert said in str(error.value) and "\n" not in str(error.value)
