"""A whole comparison of the tiny config, once: what it writes, what its arms share, and what going on with it does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import aif
from aif.checkpoint import load_arrays
from aif.config import load
from aif.directions import load_direction
from aif.errors import BadInput
from aif.results import Results

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
TRAINED = ("start", "sft", "dpo", "efe")
ARMS = TRAINED[1:]
ASKED = "{id: efficient, metric: efficiency, quantity: minimum loss, arm: efe, direction: lower, minimum_effect: 0.1}"
QUESTION = f"questions=[{ASKED}]"


@pytest.fixture(scope="module")
def config():
    return load(TINY, [QUESTION])


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "tiny"
    aif.compare(config, out=out)
    return out


@pytest.fixture(scope="module")
def results(folder) -> Results:
    return Results.load(folder / "results.json")


def stages(folder: Path) -> Path:
    return folder / "stages" / "seed-0"


def values(stage: Path) -> dict:
    return {
        f"{name}.{leaf}": np.asarray(x)
        for name, target in load_arrays(stage / "trained.safetensors")[0].items()
        for leaf, x in target.items()
    }


def lines(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def times(folder: Path) -> dict[str, int]:
    files = [p for stage in TRAINED for p in (stages(folder) / stage).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


def numbers(results: Results) -> dict:
    """Everything but when and how long."""
    found = results.model_dump(exclude={"created", "seconds"})
    for arm in found["budget"]["arms"]:
        del arm["seconds"]
    for log in found["training"]:
        for line in log["lines"]:
            del line["seconds"]
    return json.loads(json.dumps(found))


# What is written


def test_the_folder_holds_what_the_run_was_made_of(folder, config):
    assert {p.name for p in folder.iterdir()} == {
        "run.json", "config.yaml", "environment.json", "reproduce.sh", "results.json", "report.html", "samples.jsonl",
        "directions", "stages",
    }  # fmt: skip
    assert load(folder / "config.yaml") == config
    assert {"jax", "devices", "python"} <= json.loads((folder / "environment.json").read_text()).keys()
    assert "exec aif compare config.yaml --out ../tiny-again" in (folder / "reproduce.sh").read_text()
    assert {p.name for p in stages(folder).iterdir()} == set(TRAINED)


def test_every_number_has_its_unit_rows_seeds_and_interval(results, config):
    assert results.scalars and results.curves
    for record in [*results.scalars, *results.curves]:
        assert record.unit and record.rows and record.quantity, record
        assert record.n >= 1 and record.seeds == [0], record
        low, value, high = (np.atleast_1d(x) for x in (record.low, record.value, record.high))
        assert np.isfinite([low, value, high]).all() and (low <= high).all(), record
        assert len(low) == len(value) == len(high), record
        assert record.metric in config.measure
    assert all(len(c.x) == len(c.value) > 0 and c.x_label for c in results.curves)
    assert {s.label for s in results.scalars if s.arm in ARMS} == {"single seed"}  # a seed says nothing of seeds


def test_every_metric_has_every_arm_and_its_controls(results, config):
    for metric in config.measure:
        measured = {s.arm for s in results.scalars if s.metric == metric}
        excused = {
            a for a in ("contrast direction", *ARMS) if any(f"{metric}: {a} is left out" in n for n in results.notes)
        }
        assert {*ARMS, "contrast direction"} <= measured | excused, metric
        assert not measured & excused and (metric == "stability" or not excused)
    assert {s.arm for s in results.scalars if s.control} == {"random lora", "random vector"}
    assert results.arms == list(ARMS) and results.baseline == "dpo"


def test_differences_are_paired_with_the_baseline(results):
    value = {(s.metric, s.quantity, s.arm): s for s in results.scalars}
    assert {d.arm for d in results.differences} == {"sft", "efe"}
    for d in results.differences:
        mine, base = value[d.metric, d.quantity, d.arm], value[d.metric, d.quantity, "dpo"]
        assert d.baseline == "dpo" and mine.better and d.unit == mine.unit
        np.testing.assert_allclose(d.value, mine.value - base.value, rtol=1e-6, atol=1e-9)
        sign = -1 if mine.better == "lower" else 1
        sure = {True: "arm better", False: "baseline better"}[sign * d.value > 0]
        assert d.verdict == (sure if d.low * d.high > 0 else "no difference shown"), d


def test_the_budget_says_what_each_arm_had(results, config, folder):
    assert [(s.arm, s.seed) for s in results.budget.arms] == [(arm, 0) for arm in ARMS]
    assert results.budget.match == "steps" and results.budget.value is None
    for spent in results.budget.arms:
        assert spent.objective == spent.arm and spent.steps == spent.achieved == config.arms[spent.arm].steps
        assert spent.tokens == sum(line["tokens"] for line in lines(stages(folder) / spent.arm)) > 0
        assert spent.kl_from_start > 0 and (spent.effective_norm or 0) > 0
    differing = {u.what: u.values for u in results.unequal}
    assert differing["answers read"]["sft"] == "the target answer" and set(differing["tokens read"]) == set(ARMS)
    assert set(differing) == {"answers read", "tokens read"}


def test_questions_are_answered_from_the_differences(results, config):
    """One seed: at most `single seed`. The answer's numbers are those of the difference."""
    (answer,), (asked,) = results.answers, config.questions
    (d,) = [d for d in results.differences if (d.quantity, d.arm) == (asked.quantity, asked.arm)]
    assert (answer.id, answer.baseline, answer.minimum_effect) == ("efficient", "dpo", asked.minimum_effect)
    assert (answer.value, answer.low, answer.high, answer.p_adjusted) == (d.value, d.low, d.high, d.p_adjusted)
    assert answer.verdict in ("single seed", "inconclusive") and answer.reason
    assert all(0 < d.p <= d.p_adjusted <= 1 for d in results.differences)


class Loads(HTMLParser):
    """Whatever a page would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.style = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.style = tag == "style"
        if tag in ("link", "iframe", "img", "object", "embed", "base"):
            self.found.append(tag)
        self.found += [f"{k}={v}" for k, v in attrs if k in ("src", "srcset", "data", "action")]
        self.found += [f"{k}={v}" for k, v in attrs if k == "href" and not (v or "").startswith("#")]

    def handle_data(self, data):
        if self.style:
            self.found += re.findall(r"@import|url\([^)]*\)", data)


def test_the_report_is_one_file_that_loads_nothing(folder, results):
    page = (folder / "report.html").read_text()
    assert Loads(page).found == []
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    for word in ("Why is my tea bitter?", *ARMS, "random lora", "efficiency", "generality"):
        assert word in page, word
    assert Loads('<link href="x.css"><style>@import "x";</style><img src="http://x">').found  # the parser sees them


def test_samples_stand_side_by_side(results, config, folder):
    for sample in results.samples:
        assert sample.layer == 1 and sample.tokens <= config.samples.tokens and sample.arm == "base"
        assert bool(sample.direction) == bool(sample.dose)
        assert sample.perplexity > 1 and 0 <= sample.repetition <= 1
    doses = {
        prompt: [s.dose for s in results.samples if s.prompt == prompt]
        for prompt in {s.prompt for s in results.samples}
    }
    assert list(doses.values()) == [[-config.samples.dose, 0.0, config.samples.dose]] * config.samples.prompts
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["text"] for s in written] == [s.text for s in results.samples]


def test_the_direction_can_be_used_on_its_model(folder, results):
    lm = aif.load("tiny-random")
    direction = load_direction(
        folder / "directions" / "contrast.safetensors", fingerprint=lm.fingerprint, shape=(2, 64)
    )
    record = results.directions[0]
    np.testing.assert_allclose(np.linalg.norm(direction.vector[record.layer]), record.norm, rtol=1e-5)
    np.testing.assert_allclose(direction.provenance["norms"][record.layer], record.residual_norm, rtol=1e-5)
    assert direction.provenance["tokens"] > 0 and direction.kind == record.kind == "contrast"


# What arms share


def test_arms_begin_where_the_shared_stage_ended(results, folder):
    """dpo begins at ln 2 and efe at its habit, the policy that `start` ended with; sft goes on from its loss."""
    logs = {log.arm: log.lines for log in results.training}
    assert list(logs) == list(TRAINED) and all(len(log) == 3 for log in logs.values())
    assert all(logs[name] == lines(stages(folder) / name) for name in TRAINED)
    np.testing.assert_allclose(logs["dpo"][0]["loss"], np.log(2), rtol=1e-4)
    np.testing.assert_allclose(logs["efe"][0]["kl_habit"], 0.0, atol=1e-3)
    assert logs["sft"][0]["loss"] < logs["start"][0]["loss"]
    ends = {name: values(stages(folder) / name) for name in TRAINED}
    for arm in ARMS:
        assert any(not np.array_equal(ends[arm][k], ends["start"][k]) for k in ends["start"])


def test_cosines_between_the_weight_updates(results):
    names, matrix = results.cosines["names"], np.array(results.cosines["matrix"])
    assert names == list(TRAINED)
    np.testing.assert_allclose(np.diag(matrix), 1.0, rtol=1e-6)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-5)
    assert (np.abs(matrix) <= 1 + 1e-6).all() and (matrix[0, 1:] > 0.5).all()  # they hold the shared stage


def test_an_arm_against_itself_shows_no_difference(tmp_path, monkeypatch):
    """Two arms of the same objective: the shared stage is trained once a seed, and the arms end bit for bit alike."""
    from aif.experiment import Experiment

    trained, train = [], Experiment.train

    def counted(self, spec, trainable, *, seed, name, **options):
        trained.append((seed, name))
        return train(self, spec, trainable, seed=seed, name=name, **options)

    monkeypatch.setattr(Experiment, "train", counted)
    again = "arms.again={objective: {name: sft}, steps: 3}"
    measure = "measure={efficiency: {factors: [1.0]}}"
    config = load(TINY, ["~arms.dpo", "~arms.efe", again, "baseline=sft", "seeds=[0, 1]", measure, "samples.prompts=0"])
    found = aif.compare(config, out=tmp_path / "run")
    assert trained == [(seed, name) for seed in (0, 1) for name in ("start", "sft", "again")]
    for seed in (0, 1):
        place = tmp_path / "run" / "stages" / f"seed-{seed}"
        ends = {name: values(place / name) for name in ("start", "sft", "again")}
        assert all(np.array_equal(ends["sft"][k], ends["again"][k]) for k in ends["sft"])
        assert any(not np.array_equal(ends["sft"][k], ends["start"][k]) for k in ends["sft"])
    assert found.differences
    for d in found.differences:
        assert (d.value, d.low, d.high, d.verdict) == (0.0, 0.0, 0.0, "no difference shown"), d
    assert {tuple(s.seeds) for s in found.scalars if s.arm == "sft"} == {(0, 1)}
    assert found.samples == []


# Going on


def test_a_finished_comparison_is_read_back(folder, results, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    before = times(copy)
    again = aif.compare(load(TINY, [QUESTION]), out=copy, resume=True)
    assert times(copy) == before and any(name.endswith("done.json") for name in before)
    assert numbers(again) == numbers(results) == numbers(Results.load(copy / "results.json"))
    assert again.budget == results.budget  # the seconds of training too are those of the training that was done


def test_a_comparison_that_was_cut_off_trains_what_is_left(folder, results, tmp_path):
    """As if killed in the last arm: `efe` stopped at its checkpoint of step 2, and nothing was measured."""
    copy = shutil.copytree(folder, tmp_path / "tiny")
    for name in ("results.json", "report.html", "samples.jsonl"):
        (copy / name).unlink()
    shutil.rmtree(copy / "directions")
    efe = stages(copy) / "efe"
    for left in (efe / "done.json", efe / "trained.safetensors"):
        left.unlink()
    shutil.rmtree(efe / "checkpoints" / "3")
    before = times(copy)
    again = aif.compare(load(TINY, [QUESTION]), out=copy, resume=True)
    after = times(copy)
    assert {name for name in after if before.get(name) != after[name] and "/efe/" not in name} == set()
    assert numbers(again) == numbers(results)
    assert (copy / "report.html").exists()


@pytest.mark.parametrize(
    "change,key",
    [
        ("optimizer.learning_rate=1", "optimizer"),
        ("adapter.alpha=16", "adapter"),
        ("batch.length=400", "length"),
        ("corpus.limit=3", "data"),
        ("seed=1", None),
    ],
)
def test_other_settings_do_not_go_on(change, key, folder, tmp_path):
    """But a change that decides nothing of the training does: here the seed of the bootstrap and the noise."""
    copy = shutil.copytree(folder, tmp_path / "tiny")
    before = times(copy)
    config = load(TINY, [QUESTION, change])
    if key is None:
        aif.compare(config, out=copy, resume=True)
    else:
        with pytest.raises(
            BadInput, match=f"stages/seed-0/start: its checkpoint was made with another {key} "
        ) as error:
            aif.compare(config, out=copy, resume=True)
        assert "\n" not in str(error.value)
    assert times(copy) == before


def test_a_killed_comparison_goes_on_with_the_metrics_it_has(folder, results, tmp_path):
    """SIGKILL when the third metric begins: what was trained and the two finished metrics are read back, and the
    results are those of the run that was left alone."""
    copy = shutil.copytree(folder, tmp_path / "tiny")
    for left in ("results.json", "report.html", "samples.jsonl"):
        (copy / left).unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "aif.cli", "compare", str(TINY), QUESTION, "--out", str(copy), "--resume"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line.strip())
        if line.startswith("== significance"):
            process.kill()
    assert process.wait() == -signal.SIGKILL, said
    assert not (copy / "results.json").exists()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "aif-cache" / "measured").iterdir()}
    assert len(made) == 2
    again = aif.compare(load(TINY, [QUESTION]), out=copy, resume=True)
    assert numbers(again) == numbers(results) == numbers(Results.load(copy / "results.json"))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "aif-cache" / "measured").iterdir()}
    assert len(kept) == 4 and made.items() <= kept.items()


def test_comparisons_side_by_side_share_what_they_have_in_common(folder, results, tmp_path, monkeypatch):
    """Another folder beside the first: with one arm fewer, nothing is trained again; with an arm's setting changed,
    that arm alone is. What the metrics measured is of these arms, so it is measured again."""
    from aif import experiment

    trained, stage = [], experiment.stage

    def counted(*args, name, folder, **options):
        if not (folder / "done.json").exists():
            trained.append(name)
        return stage(*args, name=name, folder=folder, **options)

    monkeypatch.setattr(experiment, "stage", counted)
    shutil.copytree(folder.parent / "aif-cache", tmp_path / "aif-cache")
    quick = ["measure={generality: {prompts: 2}}", "samples.prompts=0", "resamples=20"]
    fewer = aif.compare(load(TINY, ["~arms.sft", *quick]), out=tmp_path / "fewer")
    assert trained == [] and fewer.budget.arms == [s for s in results.budget.arms if s.arm != "sft"]
    aif.compare(load(TINY, ["arms.dpo.objective.beta=0.2", *quick]), out=tmp_path / "other")
    assert trained == ["dpo"]
    aif.compare(load(TINY, ["~arms.sft", *quick]), out=tmp_path / "fewer", overwrite=True)
    assert trained == ["dpo", "start", "dpo", "efe"]


def test_a_report_can_be_made_again(folder, results, tmp_path):
    from aif.report import render

    assert render(results, tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()
