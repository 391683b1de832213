"""What arms differ in: told before training, refused where it is the data, recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from aif import fairness
from aif.config import load
from aif.errors import BadInput
from aif.experiment import Experiment
from aif.results import Spent

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"


def differing(*changes: str) -> dict:
    return {u.what: u for u in fairness.planned(Experiment(load(TINY, [*changes])))}


def test_arms_that_differ_in_their_objective_alone_differ_in_the_answers_they_read():
    found = differing()
    assert set(found) == {"answers read"}
    assert found["answers read"].values == {
        "sft": "the target answer",
        "dpo": "the target answer and one other",
        "efe": "all candidates",
    }


def test_options_of_stages_are_told():
    found = differing("arms.dpo.steps=5", "arms.efe.optimizer={learning_rate: 2e-3}")
    assert found["steps"].values == {"sft": "3", "dpo": "5", "efe": "3"}
    assert "learning_rate=0.002" in found["optimizer"].values["efe"] and not found["optimizer"].declared
    assert "steps" not in differing("arms.dpo.steps=5", "budget={value: 4}")
    assert "steps, at most" in differing("arms.dpo.steps=5", "budget={match: tokens, value: 4000}")


NARROW = ("arms.narrow={objective: {name: narrow}, steps: 3}", "corpus.domains=[bike]", "batch.length=512")


def test_unequal_data_is_refused_unless_it_is_declared():
    with pytest.raises(BadInput, match="arms: they train on different prompts .*say `unequal: .data.` if") as error:
        differing(*NARROW)
    assert "of other domains" in str(error.value) and "\n" not in str(error.value)
    assert differing(*NARROW, "unequal=[data]")["prompts"].declared
    with pytest.raises(BadInput, match="unequal.0: Input should be 'data'"):
        differing("unequal=[all]")


def test_what_training_came_to_differ_in():
    spent = [
        Spent(arm=arm, seed=seed, objective=arm, steps=3, tokens=tokens, seconds=1.0, achieved=3, kl_from_start=0.1,
              effective_norm=None)
        for arm, tokens in (("sft", 100), ("efe", 300)) for seed in (0, 1)
    ]  # fmt: skip
    (only,) = fairness.spent(spent)
    assert (only.what, only.values) == ("tokens read", {"sft": "100", "efe": "300"})
    assert fairness.spent(spent[:2]) == []


MANNER = (
    "batch.length=1500",
    "arms.manner={objective: {name: sft}, steps: 3, corpus: {path: 'bundled:style-control', target: style}}",
)


def test_an_arm_may_read_a_corpus_of_its_own():
    with pytest.raises(BadInput, match="48 prompts of bundled:style-control"):
        differing(*MANNER)
    e = Experiment(load(TINY, [*MANNER, "unequal=[data]", "corpus.limit=3"]))
    told = {u.what: u for u in fairness.planned(e)}["prompts"]
    assert told.declared and told.values["manner"] == "3 prompts of bundled:style-control"
    mine, other = e.config.arms["sft"], e.config.arms["manner"]
    assert e.on(mine) is e and e.on(other).lm is e.lm and e.on(other) is e.on(other)
    data = e.on(other).encoded(e.objective(other))
    rows = e.on(other).rows(*e.config.corpus.train)
    answer = {c.stance: c.content for c in rows[0].candidates}["style"]
    first = data.examples[0]
    assert answer[-60:] in e.lm.tokenizer.decode(first["tokens"])
    assert e.data("target", "heldout").fingerprint != data.fingerprint  # what is measured stays the config's


def test_a_stage_finds_its_target_in_its_own_corpus_or_says_so():
    e = Experiment(load(TINY, [*MANNER[:1], MANNER[1].replace("target: style", "target: kind"), "unequal=[data]"]))
    with pytest.raises(
        BadInput,
        match="style-control.jsonl:1: no answer of stance .kind. to train on; name one of control, .*style as target",
    ):
        e.check("manner")


COMPARED = [file for file in sorted(TINY.parent.glob("*.yaml")) if file.read_text().startswith("# aif compare")]


@pytest.mark.parametrize("file", COMPARED, ids=lambda file: file.stem)
def test_configs_that_come_along_say_what_their_arms_differ_in(file):
    found = {u.what: u for u in fairness.planned(Experiment(load(file, ["model.source=tiny-random"])))}
    assert "prompts" not in found or found["prompts"].declared
