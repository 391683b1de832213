"""Scores, tiers, and that a tier's weight reaches the loss of every objective with the value found by hand."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from aif.batches import build, once
from aif.config import check
from aif.corpus import Candidate, Conversation, Dimension, Message, Scale, read
from aif.corpus.tiers import Tiers, sampling_weights, score, summary, target_of, tiers
from aif.errors import BadInput
from aif.experiment import Experiment
from aif.objectives.dpo import preference
from aif.objectives.efe import efe
from aif.objectives.logprobs import token_logprobs
from aif.objectives.sft import sft
from aif.preferences import normalise
from aif.readers.ratings import ratings
from aif.types import as_partial

SCALE = Scale("s", ("no", "some", "yes"), (Dimension("a", "a"), Dimension("b", "b")))


def row(words: int = 100, **fields) -> Conversation:
    levels, markers = fields.pop("ratings", {"a": 2, "b": 1}), fields.pop("answer_markers", ())
    answer = Candidate(" ".join(["w"] * words), "t", levels, markers=markers)
    about = {"id": "r", "domain": "d", "language": "", "split": "", "kind": "chat", "where": "f:1"}
    return Conversation(**about, prompt=(Message("user", "x"),), candidates=(answer,), **fields)


def test_a_score_by_hand():
    """rating (2 + 1)/2 / 2 = 0.75; 2 turns of half 2: 1/2, 100 words of half 300: 1/4, depth 3/8;
    markers (1 - 0.5 + 0) / 2 = 0.25; score (0.5 * 0.75 + 0.3 * 0.375 + 0.2 * 0.25) / 1 = 0.5375."""
    rule = Tiers(
        rating=0.5, depth=0.3, marked=0.2, half_turns=2, half_words=300, markers={"warm": 1.0, "flat": -0.5, "wild": 1}
    )
    marked = row(markers=("warm",), answer_markers=("flat", "unknown"))
    found = score(marked, marked.candidates[0], SCALE, rule)
    assert found == pytest.approx((0.5375, 0.75, 0.375, 0.25))


def test_parts_that_are_not_known_are_left_out():
    """Without ratings and marker weights the depth is all; a row of negative markers has 0, not less."""
    rule = Tiers(half_turns=2, half_words=300)
    plain = row(ratings={})
    assert score(plain, plain.candidates[0], SCALE, rule) == pytest.approx((0.375, None, 0.375, None), abs=1e-9)
    against = row(markers=("flat",))
    assert score(against, against.candidates[0], SCALE, Tiers(markers={"flat": -1.0, "x": 1.0})).markers == 0.0


def test_the_score_grows_with_depth_and_saturates():
    rule = Tiers(rating=0, marked=0, depth=1)
    values = [score(row(words=n), row(words=n).candidates[0], SCALE, rule).score for n in (1, 10, 100, 1000, 10**5)]
    assert values == sorted(values) and values[-1] < 1 and values[2] - values[1] > values[4] - values[3]


def test_tiers_by_quantile_and_by_threshold():
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert tiers(values, Tiers(high=0.75, mid=0.25)) == ["broad", "mid", "mid", "high", "high"]
    assert tiers(values, Tiers(by="threshold", high=0.5, mid=0.25)) == ["broad", "broad", "mid", "mid", "high"]
    assert tiers([0.3, 0.3], Tiers()) == ["high", "high"]


def test_a_rows_score_is_that_of_its_target_answer(rows):
    assert (
        target_of(rows[0], "discernment").stance == "discernment" and target_of(rows[0], "x") == rows[0].candidates[0]
    )
    rule = Tiers(rating=1, depth=0, marked=0, by="threshold", high=0.7, mid=0.3, weights={"high": 3.0})
    from aif.corpus import load_scale

    found = summary(rows, load_scale(), rule, "discernment")
    for entry, source in zip(found["rows"], rows, strict=True):
        levels = list(target_of(source, "discernment").ratings.values())
        assert entry["rating"] == pytest.approx(np.mean(levels) / 3, abs=1e-4) and entry["score"] == entry["rating"]
        assert entry["weight"] == {"high": 3.0, "mid": 1.0, "broad": 0.5}[entry["tier"]]
    assert sum(t["rows"] for t in found["tiers"].values()) == len(rows)
    assert sampling_weights(rows, load_scale(), rule, "discernment") == [e["weight"] for e in found["rows"]]
    json.dumps(found, allow_nan=False)


def test_markers_are_read_and_checked(tmp_path):
    file = tmp_path / "r.jsonl"
    base = {"prompt": "Why?", "completion": "So.", "markers": ["warm", "wild"]}
    file.write_text(json.dumps(base) + "\n")
    assert read(file).rows[0].markers == ("warm", "wild") and read(file).rows[0].extra == {}
    file.write_text(json.dumps({**base, "markers": "warm"}) + "\n")
    with pytest.raises(BadInput, match="r.jsonl:1: markers: must be a list of words; "):
        read(file)
    candidates = [{"content": "a", "markers": ["x"]}, {"content": "b", "markers": [1]}]
    file.write_text(json.dumps({"prompt": "Why?", "candidates": candidates}) + "\n")
    with pytest.raises(BadInput, match=r"candidates\[1\].markers: must be a list of words"):
        read(file)


# the loss -------------------------------------------------------------------------------------------------------------

WEIGHTS = [0.25, 1.0, 4.0, 2.0, 0.5, 1.0, 3.0, 1.5]


def test_weights_reach_the_loss_of_sft_with_the_value_by_hand(lm, base, rows):
    """- sum_i w_i sum_t ln p / sum_i w_i n_i, with the sums of every row taken apart."""
    weighed = build(rows, lm.tokenizer, which="target", length=384, target="discernment", weights=WEIGHTS)
    plain = build(rows, lm.tokenizer, which="target", length=384, target="discernment")
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for batch in once(plain, rows=1):
        logps = np.asarray(jax.jit(token_logprobs)(base, batch))
        for b, slot in zip(*np.nonzero(batch.ids >= 0), strict=True):
            mine = (batch.response[b] == slot) & (batch.weights[b] > 0)
            number = plain.owners[batch.ids[b, slot]][0]
            nats[number], tokens[number] = -logps[b, mine].sum(), mine.sum()
    w = np.array(WEIGHTS)
    assert total_of(sft(), base, weighed, base) == pytest.approx((w @ nats) / (w @ tokens), rel=1e-5)
    assert total_of(sft(), base, plain, base) == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert abs((w @ nats) / (w @ tokens) - nats.sum() / tokens.sum()) > 1e-3


@jax.jit
def loss_of(loss, prepare, policy, reference, batch):
    facts = prepare(reference, batch, jax.random.key(0))
    return loss(policy, batch._replace(extras={**batch.extras, **facts})).total


def total_of(objective, policy, data, reference) -> float:
    """The loss over the whole data set, from the sums of its batches."""
    functions = as_partial(objective.loss), as_partial(objective.prepare)
    parts = [loss_of(*functions, policy, reference, batch) for batch in once(data, rows=2)]
    return float(sum(p.sum for p in parts) / sum(p.weight for p in parts))


@pytest.mark.parametrize("name", ["dpo", "efe"])
def test_weights_reach_the_loss_per_prompt(lm, base, adapter, rows, name):
    """sum_i w_i loss_i / sum_i w_i, with the loss of every prompt taken apart."""
    C = normalise(np.tile(np.arange(4.0), (2, 1)))
    objective = preference(beta=0.5) if name == "dpo" else efe(ratings(2, 4), C)
    policy = base.replace(adapter=adapter)

    def of(chosen, weights):
        data = build(
            chosen,
            lm.tokenizer,
            which=objective.responses,
            length=384,
            target="discernment",
            dimensions=("playfulness", "excess"),
            weights=weights,
        )
        return total_of(objective, policy, data, base)

    few, w = list(rows[:3]), np.array([0.25, 1.0, 4.0])  # a prompt taken apart by the weights of the others
    alone = np.array([of(few, [1.0 if k == number else 1e-9 for k in range(3)]) for number in range(3)])
    assert of(few, list(w)) == pytest.approx((w @ alone) / w.sum(), rel=1e-4)
    assert of(few, None) == pytest.approx(alone.mean(), rel=1e-4)


def tiny(**tiers) -> Experiment:
    config = {
        "model": {"source": "tiny-random"},
        "corpus": {"path": "bundled:tiny", **({"tiers": tiers} if tiers else {})},
        "batch": {"length": 384},
        "arms": {"sft": {"objective": {"name": "sft"}, "steps": 1}},
    }
    return Experiment(check(config))


def test_the_configs_tiers_weigh_training_rows_and_no_others():
    weighed = tiny(rating=0, depth=1, marked=0, weights={"broad": 0.1, "high": 7.0})
    found = [float(e["weights"][0]) for e in weighed.data("target", "train", "").examples]
    assert found == pytest.approx(weighed.weights(weighed.rows("train", ""))) and len(set(found)) > 1
    assert max(found) == 7.0
    assert {float(e["weights"][0]) for e in weighed.data("target", "heldout").examples} == {1.0}
    assert {float(e["weights"][0]) for e in tiny().data("target", "train", "").examples} == {1.0}


@pytest.mark.parametrize(
    "tiers, expected",
    [
        ({"mid": 0.9, "high": 0.5}, "mid=0.9 lies above high=0.5"),
        ({"rating": 0, "depth": 0, "marked": 0}, "give one of them a weight"),
        ({"weights": {"high": 0}}, "greater than 0"),
        ({"weights": {"top": 1}}, "weights"),
        ({"weight": {}}, "did you mean 'weights'"),
        ({"by": "rank"}, "tiers.by"),
    ],
)
def test_rules_that_are_none(tiers, expected):
    with pytest.raises(BadInput, match="corpus.tiers") as caught:
        tiny(**tiers)
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1
