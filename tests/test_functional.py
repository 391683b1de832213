"""Functional probes: edits observed on a real forward, the blind reader, and the rule on responses made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from aif.basins.scoring import losses
from aif.batches import build
from aif.directions.activations import Activations, response_means
from aif.directions.causal import (
    Observed,
    Readout,
    blind_reader,
    comparable,
    log_odds,
    mixed,
    observe,
    per_prompt,
    thirds,
)
from aif.directions.functional import Controls, Trial, controls, functional
from aif.directions.layers import layer_map
from aif.errors import BadInput

DOSES = (-1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def trial(base, rows, lm):
    data = build(rows[:2], lm.tokenizer, which="pair", length=384, target="discernment")
    return Trial(base, data, data.tables["preference"] > 0, np.array([3.0, 4.0]), rows=1)


# On a real forward


def test_what_is_observed_without_edits(trial, base):
    """Means are those of extraction, log-probabilities those of the one way to score."""
    seen = observe(base, trial.data, rows=1)
    np.testing.assert_allclose(seen.means, response_means(base, trial.data, rows=1).means, atol=1e-5)
    sums, tokens = losses(base, trial.data, rows=1)
    np.testing.assert_allclose(seen.logps, -sums / tokens, rtol=1e-5)
    still = trial.pushed(np.ones(64), 0, 0.0)
    np.testing.assert_allclose(still.means, seen.means, atol=1e-4)


def test_a_push_and_an_ablation_do_what_they_say(trial, base):
    v = np.random.default_rng(0).normal(size=64)
    unit = v / np.linalg.norm(v)
    plain, pushed, gone = observe(base, trial.data, rows=1), trial.pushed(v, 0, -0.5), trial.ablated(v)
    np.testing.assert_allclose(pushed.means[:, 0] - plain.means[:, 0], np.tile(-0.5 * 3.0 * unit, (4, 1)), atol=1e-4)
    assert np.abs(pushed.means[:, 1] - plain.means[:, 1]).max() > 0.1
    np.testing.assert_allclose(gone.means @ unit, 0.0, atol=1e-4)


def test_a_blind_reader_sees_nothing_of_the_direction():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(60, 2, 10))
    positive = means[:, 1, 0] > 0
    v = np.eye(10)[0] + 0.3 * np.eye(10)[1]
    means[:, 1, 2] += 2.0 * positive
    reader = blind_reader(Activations(means, np.ones(60), np.ones(2)), positive, v, 1, strength=1.0)
    moved = means + 100 * v
    np.testing.assert_allclose(reader.read(moved), reader.read(means), atol=1e-5)
    assert ((reader.read(means) > 0) == positive).mean() > 0.75  # it still reads what else there is


def test_a_map_of_layers(base, rows, lm):
    data = build(rows, lm.tokenizer, which="pair", length=384, target="discernment")
    (found,) = layer_map(base, data, data.tables["preference"] > 0, layers=[0], doses=DOSES, rows=2, count=1)
    assert (found.layer, found.reader_layer, found.prompts) == (0, 1, 2) and found.verdict in ("read-only", "inert")
    assert len(found.reading) == 3 and found.reading[1].low <= found.reading[1].value <= found.reading[1].high
    with pytest.raises(BadInput, match="layer 1 has no later layer for a reader"):
        layer_map(base, data, data.tables["preference"] > 0, layers=[1], doses=DOSES, rows=2)


# The rule


@dataclass(frozen=True)
class Made(Trial):
    """Forty prompts of two responses; a dose moves the reader's coordinate and the log-odds by given curves."""

    reading: dict = field(default_factory=dict)
    odds: dict = field(default_factory=dict)
    left: float = 0.2

    def observed(self, reading=0.0, odds=0.0, left=1.0):
        rng = np.random.default_rng(1)
        n = len(self.positive)
        means = np.zeros((n, 2, 3))
        means[:, 0, 0] = np.where(self.positive, 1.0, -1.0) + rng.normal(size=n)
        means[:, 1, 1] = reading + left * np.where(self.positive, 1.0, -1.0) + 0.1 * rng.normal(size=n)
        return Observed(means, np.where(self.positive, odds, 0.0) - 2.0 + 0.1 * rng.normal(size=n))

    def pushed(self, vector, layer, dose):
        return self.observed(self.reading[dose], self.odds[dose])

    def ablated(self, vector):
        return self.observed(left=self.left)


class Forty:
    prompts = np.arange(80) // 2


STRAIGHT = {-1.0: -1.0, 0.0: 0.0, 1.0: 1.0}
FLAT = dict.fromkeys(STRAIGHT, 0.0)
BENT = {-1.0: -1.0, 0.0: 0.0, 1.0: -0.4}  # up on the whole, but down at the end


def judged(reading=STRAIGHT, odds=STRAIGHT, left=0.2, random=(0.1, 0.1, 0.98), vector=(1.0, 0.0, 0.0)):
    made = Made(None, Forty, np.arange(80) % 2 == 0, np.ones(2), reading=reading, odds=odds, left=left)
    ends = (made.observed(), made.observed(random[0], random[1]))
    control = Controls(np.zeros((1, 3)), [ends], [made.observed(left=random[2])])
    reader = Readout(1, np.array([0.0, 1.0, 0.0]), 0.0)
    return functional(made, np.array(vector), 0, reader, doses=DOSES, base=made.observed(), random=control)


def test_what_moves_and_goes_is_functional():
    """Rises are 2, the share removed 1 - 0.2 = 0.8, the gap 2, all within the noise of 0.1 over 40 prompts."""
    found = judged()
    assert found.verdict == "functional" and all(found.passed.values()) and found.prompts == 40
    for interval, want in ((found.reading_rise, 2.0), (found.log_odds_rise, 2.0), (found.removed, 0.8), (found.gap, 2)):
        assert interval.value == pytest.approx(want, abs=0.1) and interval.low <= interval.value <= interval.high
    assert found.reading_random == pytest.approx(0.1, abs=0.05)
    assert found.removed_random == pytest.approx(0.02, abs=0.02)


@pytest.mark.parametrize(
    "change,failed",
    [
        ({"reading": FLAT}, "reading"),
        ({"odds": FLAT}, "log_odds"),
        ({"odds": BENT}, "log_odds"),
        ({"odds": {d: -x for d, x in STRAIGHT.items()}}, "log_odds"),
        ({"left": 1.0}, "ablation"),
        ({"random": (3.0, 0.1, 0.98)}, "reading"),
        ({"random": (-3.0, 0.1, 0.98)}, "reading"),
        ({"random": (0.1, 0.1, 0.1)}, "ablation"),
    ],
)
def test_each_condition_is_needed(change, failed):
    found = judged(**change)
    assert [name for name, ok in found.passed.items() if not ok] == [failed]
    assert found.verdict == "read-only"


def test_what_does_neither_is_inert():
    """The third coordinate of the residual is zero for every response: nothing to read."""
    found = judged(reading=FLAT, odds=FLAT, left=1.0, vector=(0.0, 0.0, 1.0))
    assert found.verdict == "inert" and not any(found.passed.values()) and found.auroc.value == 0.5


def test_means_over_prompts_by_hand():
    values, positive, prompts = np.array([1.0, 3, 5, 7]), np.array([1, 0, 1, 1], bool), np.array([4, 4, 4, 9])
    np.testing.assert_allclose(per_prompt(values, positive, prompts), [3.0, 7.0])
    np.testing.assert_allclose(log_odds(values[:3], positive[:3], prompts[:3]), [0.0])
    with pytest.raises(BadInput, match="a prompt has responses of one class only"):
        log_odds(values, positive, prompts)


def test_prompts_without_both_classes_are_left_out(trial):
    positive, prompts = np.array([1, 0, 1, 1], bool), trial.data.prompts
    some, on = comparable(trial.data, positive)
    assert mixed(prompts, positive).tolist() == on.tolist() == [True, True, False, False]
    assert some.prompts.tolist() == prompts[:2].tolist()
    with pytest.raises(BadInput, match="no prompt has responses of both classes"):
        comparable(trial.data, np.array([1, 1, 0, 0], bool))


def test_thirds_share_no_prompt():
    prompts = np.repeat(np.arange(10), 3)
    parts = thirds(prompts, seed=0)
    assert sum(p.sum() for p in parts) == 30 and not any((a & b).any() for a, b in zip(parts, parts[1:], strict=False))
    assert [len(set(prompts[p])) for p in parts] == [4, 3, 3]
    with pytest.raises(BadInput, match="5 prompts cannot be split in three"):
        thirds(np.arange(5), seed=0)


def test_what_cannot_be_tried_is_refused(trial):
    reader, v = Readout(1, np.zeros(64), 0.0), np.ones(64)
    for arguments, options, message in (
        ((v, 2, reader), {}, "direction: layer 2 is out of range; the model has layers 0..1"),
        ((v, 1, reader), {}, "reader: layer 1 is not later than the direction's 1"),
        ((v, 0, reader), {"doses": (0.0, 1.0, 2.0)}, "do not rise through 0"),
        ((v, 0, reader), {"doses": (1.0, 0.0, -1.0)}, "do not rise through 0"),
        ((v * np.nan, 0, reader), {}, "zero or not finite at this layer"),
        ((v * 0, 0, reader), {}, "zero or not finite at this layer"),
    ):
        with pytest.raises(BadInput, match=message):
            functional(trial, *arguments, **options)


def test_responses_that_do_not_count_change_nothing(trial, base):
    """Counting the first prompt's two responses alone is trying on that prompt alone."""
    first = np.array([True, True, False, False])
    some = replace(trial, positive=trial.positive[first], counted=first)
    alone = replace(trial, positive=trial.positive[first], data=trial.data.only([0]))
    assert some.prompts.tolist() == alone.prompts.tolist()
    for one, two in zip(some.pushed(np.ones(64), 0, 1.0), alone.pushed(np.ones(64), 0, 1.0), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)
    made = controls(trial, 0, ends=(-1.0, 1.0), count=1).only(first)
    assert made.ends[0][1].means.shape[0] == made.ablated[0].logps.shape[0] == 2


def test_controls_are_as_many_as_asked(trial):
    made = controls(trial, 0, ends=(-1.0, 1.0), count=1)
    assert len(made.ends) == len(made.ablated) == len(made.vectors) == 1
    np.testing.assert_allclose(np.linalg.norm(made.vectors, axis=1), 1.0)
