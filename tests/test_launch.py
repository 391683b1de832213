"""Jobs of a comparison in other processes: submitit's local executor and Ray's local cluster, with workers that die."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import aif
from aif.checkpoint import load_arrays
from aif.config import load
from aif.errors import BadInput
from aif.launch import MINUTES, Job, Submitit, cause, waves

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
MORTAL = """
import os, signal
from pathlib import Path
from aif.objectives.sft import sft
from aif.objectives import Objective

HERE = Path(__file__).parent

def mortal(times):
    def schedule(progress):
        deaths = len(list(HERE.glob("death-*")))
        if progress > 0.6 and deaths < times:
            (HERE / f"death-{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain.loss
    plain = sft()
    return Objective(plain.loss, responses="target", name="mortal", schedule=schedule)
"""


def config(*changes: str):
    """Two arms, no metrics to speak of; `frail` dies in its last step, `times` times."""
    frail = "{objective: {name: 'mortal:mortal', times: 1}, steps: 3}"
    arms = f"arms={{sft: {{objective: {{name: sft}}, steps: 3}}, frail: {frail}}}"
    quick = ["measure={generality: {prompts: 2}}", "samples.prompts=0", "resamples=20", "checkpoint.every=1"]
    few = ["launch={at_once: 1, retries: 1, cluster: local}", "baseline=sft"]
    return load(TINY, [arms, *quick, *few, *changes])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mortal", raising=False)  # another test's module, with another count of deaths
    return tmp_path


def needs(name: str):
    missing = importlib.util.find_spec(name) is None
    return pytest.param({"submitit": "slurm"}.get(name, name), marks=pytest.mark.skipif(missing, reason=f"no {name}"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [needs("submitit"), needs("ray")])
def test_a_job_that_is_killed_goes_on_where_it_was(launcher, here):
    """SIGKILL in the last step of an arm: it is tried again, continues at its checkpoint, and ends as it would have."""
    found = aif.compare(config(), out=here / "jobs", launcher=launcher)
    assert len(list(here.glob("death-*"))) == 1
    alone = aif.compare(config(), out=here / "alone", cache=here / "other")
    assert found.scalars == alone.scalars and found.differences == alone.differences
    for arm in ("start", "sft", "frail"):
        ends = [load_arrays(here / run / "stages/seed-0" / arm / "trained.safetensors")[0] for run in ("jobs", "alone")]
        assert all((ends[0][t][x] == ends[1][t][x]).all() for t in ends[0] for x in ends[0][t]), arm


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [needs("submitit")])
def test_a_job_that_dies_too_often_is_named_and_nothing_is_lost(launcher, here):
    with pytest.raises(BadInput, match=r"jobs: frail, seed 0: died \(.*continue with --resume") as error:
        aif.compare(config("arms.frail.objective.times=2"), out=here / "run", launcher=launcher)
    assert "\n" not in str(error.value) and "sft, seed" not in str(error.value)
    stages = here / "run" / "stages" / "seed-0"
    assert all((stages / arm / "done.json").exists() for arm in ("start", "sft"))
    before = (stages / "sft" / "trained.safetensors").stat().st_mtime_ns
    aif.compare(config("arms.frail.objective.times=2"), out=here / "run", resume=True)
    assert (stages / "sft" / "trained.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("given, minutes", [("{}", MINUTES), ("{timeout_min: 7}", 7)])
def test_a_job_has_a_day_unless_the_config_says_otherwise(given, minutes, tmp_path):
    pytest.importorskip("submitit")
    pool = Submitit(tmp_path, config(f"launch.parameters={given}").launch)
    assert pool.executor.parameters["timeout_min"] == minutes


def test_the_cause_of_a_death_is_the_exception_that_its_trace_ends_with():
    trace = "Job (task=0) failed during processing with trace:\n----------\nTraceback (most recent call last):\n"
    trace += (
        '  File "a.py", line 1, in work\nValueError: first\n\nDuring handling:\n  raise\nos.Unlucky: no room\n-----\n'
    )
    assert cause(RuntimeError(trace + "For simplicity, JAX has removed its internal frames.")) == "os.Unlucky: no room"
    assert cause(RuntimeError("The worker died unexpectedly.\n\tpid: 7")) == "The worker died unexpectedly."
    assert cause(KeyError()) == "KeyError"


def test_what_arms_share_comes_first():
    first, second = waves(config("seeds=[0, 3]"))
    assert first == [Job(0, ""), Job(3, "")]
    assert second == [Job(s, a) for s in (0, 3) for a in ("sft", "frail")]
    assert waves(config("~start"))[0] == []
    assert [str(j) for j in (first[1], second[0])] == ["shared stage, seed 3", "sft, seed 0"]


def test_a_launcher_that_is_not_there(tmp_path, monkeypatch):
    def refused(launcher, *changes) -> str:
        with pytest.raises(BadInput) as error:
            aif.compare(config(*changes), out=tmp_path / "run", launcher=launcher)
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert "'slrum' is none; choose local, slurm or ray" in refused("slrum")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "ray is not installed; `pip install aif[ray]`" in refused("ray")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "there is no sbatch here" in refused("slurm", "launch.cluster=slurm")
