"""The command line: its verbs, and one line with exit status 2 for every mistake of the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from aif.checkpoint import load_arrays, save_arrays
from aif.corpus import bundled
from aif.models.hub import load
from aif.runtime import Stopped

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")
SHORT = ("start.steps=1", "arms.sft.steps=1", "log.tensorboard=false")
FEW = ("--model", "tiny-random", "--tokens", "3")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Help and usage are laid out for the terminal at hand."""
    monkeypatch.setenv("COLUMNS", "200")


# What works


def test_help_is_light():
    """Neither help nor the config schema imports jax or transformers."""
    script = """
import sys
from aif.cli import main
for words in (["--help"], ["run", "--help"], ["models", "--help"], ["config", "schema"]):
    sys.argv = ["aif", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
heavy = {"jax", "jaxlib", "transformers", "torch", "optax", "orbax", "grain", "flax", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for verb in ("run", "compare", "report", "generate", "chat", "models", "corpus", "config"):
        assert verb in done.stdout


def test_config_check_prints_a_config_that_means_the_same(call, tmp_path):
    status, out, err = call("config", "check", TINY, "seed=5", "~arms.efe")
    assert (status, err) == (0, "")
    tree = yaml.safe_load(out)
    assert tree["seed"] == 5 and list(tree["arms"]) == ["sft", "dpo"] and tree["optimizer"]["b1"] == 0.9
    (tmp_path / "again.yaml").write_text(out)
    assert call("config", "check", tmp_path / "again.yaml") == (0, out, "")


def test_config_schema(call):
    status, out, _ = call("config", "schema")
    assert status == 0 and json.loads(out)["properties"].keys() >= {"arms", "model", "seed"}


def test_models(call):
    status, out, _ = call("models", "list")
    assert status == 0 and "smollm2-135m" in out and "tiny-random" in out
    status, out, _ = call("models", "inspect", "tiny-random")
    facts = json.loads(out)
    assert status == 0 and facts["layers"] == 2 and facts["parameters"] > 0 and facts["chat_template"]


def test_corpus_check(call, tmp_path):
    status, out, err = call("corpus", "check", "bundled:tiny")
    facts = json.loads(out)
    assert (status, err) == (0, "") and facts["rows"] == 8 and facts["skipped"] == 0
    (tmp_path / "c.jsonl").write_bytes(bundled("tiny").read_bytes() + b'{"prompt": 3}\n')
    status, out, err = call("corpus", "check", tmp_path / "c.jsonl", "--skip-bad-rows")
    assert status == 0 and json.loads(out)["skipped"] == 1
    assert err.startswith("skipped: ") and "c.jsonl:9: " in err and err.count("\n") == 1


def test_generate_says_the_same_twice(call):
    status, out, err = call("generate", "Hello", *FEW)
    assert (status, err) == (0, "") and out.endswith("\n")
    assert call("generate", "Hello", *FEW) == (status, out, err)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step a stage, by its command line: its folder and what it said."""
    folder = tmp_path_factory.mktemp("cli") / "runs" / "one"
    words = [sys.executable, "-m", "aif.cli", "run", TINY, *SHORT, "--out", str(folder)]
    return folder, subprocess.run(words, capture_output=True, text=True, cwd=folder.parent.parent)


def test_a_run_leaves_a_folder_that_says_how_it_was_made(trained, call):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"run: {folder}\n"
    assert "start: compiled in" in done.stderr and "sft: 1/1 loss" in done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
    files = {p.name for p in folder.iterdir()}
    assert files == {"run.json", "config.yaml", "environment.json", "reproduce.sh", "stages"}
    assert call("config", "check", folder / "config.yaml")[0] == 0
    assert json.loads((folder / "environment.json").read_text()).keys() >= {"jax", "python", "devices"}
    script = (folder / "reproduce.sh").read_text()
    assert "exec aif run config.yaml --out ../one-again\n" in script
    values, about = load_arrays(folder / "stages" / "seed-0" / "sft" / "trained.safetensors")
    assert values["q"]["a"].shape == (2, 64, 4) and about["name"] == "sft"


def test_a_trained_adapter_answers(trained, call):
    file = trained[0] / "stages" / "seed-0" / "sft" / "trained.safetensors"
    status, out, err = call("generate", "Hello", *FEW, "--adapter", file)
    assert (status, err) == (0, "") and out.endswith("\n")


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    """A direction of the random model."""
    lm = load("tiny-random")
    about = {"kind": "contrast", "weights": lm.fingerprint, "layer": 1, "norms": [1.0, 2.0]}
    file = tmp_path_factory.mktemp("directions") / "d.safetensors"
    save_arrays(file, {"direction": np.eye(2, 64, dtype=np.float32)}, about)
    return file


@pytest.mark.parametrize(
    "steer",
    [
        ["--steer", "{}:0.5"],
        ["--steer", "{0}:-2@0,{0}:1", "--steer", "{0}:0.1", "--clamp", "{0}:0", "--scope", "last"],
        ["--ablate", "{}", "--scope", "0,2:4"],
    ],
)
def test_steering(steer, direction, call):
    status, out, err = call("generate", "Hello", *FEW, *(word.format(direction) for word in steer))
    assert (status, err) == (0, "") and out.endswith("\n")


# What is wrong

BROKEN_CONFIGS = {
    "unknown key": (("sed=1",), "sed: unknown key, did you mean 'seed'?"),
    "unknown key below": (("arms.sft.step=1",), "arms.sft.step: unknown key, did you mean 'steps'?"),
    "not a number": (("seed=yes",), "seed: true stands here"),
    "unknown objective": (("arms.sft.objective.name=stf",), "no objective is called 'stf', did you mean 'sft'?"),
    "no override": (("seed",), "seed: an override reads key.sub=value"),
}


@pytest.mark.parametrize("verb", [("run",), ("compare",), ("config", "check")], ids=" ".join)
@pytest.mark.parametrize("what", BROKEN_CONFIGS)
def test_a_config_that_is_wrong(verb, what, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, line = BROKEN_CONFIGS[what]
    refused(*verb, TINY, *changes, line=line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [("run",), ("compare",), ("config", "check")], ids=" ".join)
def test_a_config_that_is_missing(verb, refused, tmp_path):
    refused(*verb, tmp_path / "c.yaml", line=f"error: {tmp_path / 'c.yaml'}: cannot be read (No such file")


BROKEN_EXPERIMENTS = {
    "unknown arm": (("--arm", "sfd"), "arm: no arm is called 'sfd'; arms are sft, dpo, efe"),
    "no such model folder": (("model.source=./nowhere",), "./nowhere: no such model, folder or .gguf file"),
    "unknown model": (("model.source=tiny-randm",), "tiny-randm: no such model, folder or .gguf file; did you mean"),
    "no such corpus": (("corpus.path=nowhere.jsonl",), "nowhere.jsonl: there is no such file"),
    "no such bundled corpus": (("corpus.path='bundled:tny'",), "bundled:tny: no such corpus, did you mean 'tiny'?"),
    "no such scale": (("corpus.scale=nexis",), "no scale is called 'nexis'"),
    "no such split": (("corpus.train=[trian]",), "no rows with split 'trian'"),
    "a row that does not fit": (("batch.length=20",), "tiny.jsonl:1: "),
    "longer than the model": (("batch.length=9999",), "batch.length: 9999 is longer than the model's 4096"),
    "adapter layer": (("adapter.layers=[2]",), "adapter.layers: layer 2 is out of range; the model has layers 0..1"),
    "adapter target": (("adapter.targets=[query]",), "adapter.targets: no layer is called 'query'"),
    "objective of one's own": (("arms.sft.objective.name='no.module:it'",), "'no.module:it' cannot be imported"),
    "objective without a name": (("arms.sft.objective.name=':'",), "':' cannot be imported"),
    "objective that is none": (("arms.sft.objective={name: 'json:dumps', obj: 1}",), "json:dumps: makes str"),
    "objective's options": (("arms.sft.objective={name: 'json:dumps', x: 1}",), "cannot be called with these options"),
}


@pytest.mark.parametrize("what", BROKEN_EXPERIMENTS)
def test_an_experiment_that_cannot_be(what, refused, call, tmp_path):
    """Before any training, and without standing in the way of the next try."""
    changes, line = BROKEN_EXPERIMENTS[what]
    for _ in range(2):
        refused("run", TINY, *SHORT, "--out", tmp_path / "run", *changes, line=line)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    "changes,line",
    [
        (("direction.layer=2",), "direction.layer: 2 is out of range; the model has layers 0..1"),
        (("arms.dpo.objective.name='no.module:it'",), "'no.module:it' cannot be imported"),
        (("corpus.heldout=nothing",), "no rows with split 'nothing'"),
    ],
)
def test_a_comparison_that_cannot_be(changes, line, call, tmp_path):
    status, _, err = call("compare", TINY, *SHORT, "--out", tmp_path / "run", *changes)
    assert status == 2 and err.splitlines()[-1].startswith("error: ") and line in err.splitlines()[-1]
    assert not (tmp_path / "run" / "stages").exists()  # found before any training


BAD_ROWS = {
    "not JSON": (b'{"prompt": ', ":9: "),
    "no words": (b'{"id": "x", "prompt": "Why?", "completion": " "}', ":9: "),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', ":9: "),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(what, refused, tmp_path):
    row, line = BAD_ROWS[what]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bundled("tiny").read_bytes() + row + b"\n")
    refused("corpus", "check", file, line=f"error: {file}{line}")
    refused("run", TINY, f"corpus.path={file}", "--out", tmp_path / "run", line=f"error: {file}{line}")


@pytest.mark.parametrize("verb", [("models", "inspect"), ("generate", "Hello", "--model")], ids=" ".join)
def test_a_model_that_is_not_there_or_damaged(verb, refused, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 30)
    (tmp_path / "empty").mkdir()
    refused(*verb, tmp_path / "cut.gguf", line=f"{tmp_path / 'cut.gguf'}: ")
    refused(*verb, tmp_path / "no.gguf", line="no such model, folder or .gguf file")
    refused(*verb, tmp_path / "nowhere", line="no such model, folder or .gguf file")
    refused(*verb, tmp_path / "empty", line=str(tmp_path / "empty"))
    refused(*verb, "smolm2-135m", line="did you mean smollm2-135m?")


def test_a_model_that_cannot_be_fetched(refused):
    refused("models", "fetch", "smolm2", line="smolm2: is not in the catalogue; did you mean smollm2-135m?")


@pytest.mark.parametrize(
    "spec,line",
    [
        ("{}:0.5@2", "layer 2 is out of range; the model has layers 0..1"),
        ("{}:0.5@-1", "layer -1 is out of range"),
        ("{}:much", "write FILE:DOSE or FILE:DOSE@LAYER"),
        ("{}:nan", "write FILE:DOSE or FILE:DOSE@LAYER"),
        ("{}:0.5@one", "write FILE:DOSE or FILE:DOSE@LAYER"),
        ("{}", "write FILE:DOSE or FILE:DOSE@LAYER"),
        ("0.5", "write FILE:DOSE or FILE:DOSE@LAYER"),
        ("nowhere.safetensors:0.5", "nowhere.safetensors: no such file"),
    ],
)
def test_steering_that_cannot_be(spec, line, direction, refused):
    refused("generate", "Hello", *FEW, "--steer", spec.format(direction), line=line)


@pytest.mark.parametrize("verb", [("generate", "Hello"), ("chat",)], ids=lambda v: v[0])
@pytest.mark.parametrize(
    "options,line",
    [
        (("--temperature", "-1"), "temperature: -1.0 is not a temperature"),
        (("--temperature", "1", "--top-p", "0"), "top_p: 0.0 is not within (0, 1]"),
        (("--temperature", "1", "--top-p", "1.5"), "top_p: 1.5 is not within (0, 1]"),
        (("--top-k", "5"), "temperature: 0 draws nothing"),
        (("--temperature", "1", "--min-p", "-0.1"), "min_p: -0.1 is not within [0, 1]"),
        (("--scope", "mine"), "scope: 'mine' is none; choose from all, prompt, response, last"),
        (("--scope", "3:2"), "scope: slice(3, 2, None) names no position"),
        (("--scope", "last"), "--scope last: nothing is steered"),
    ],
)
def test_answers_that_cannot_be_drawn(verb, options, line, refused):
    refused(*verb, "--model", "tiny-random", *options, line=line)


def test_positions_beyond_the_text(direction, refused):
    refused(
        "generate", "Hello", *FEW, "--steer", f"{direction}:1", "--scope", "900", line="position 900 is out of range"
    )


def test_a_conversation_side_by_side(direction, call, monkeypatch):
    """Turns come line by line; a dose of 0 answers as the plain model does, turn after turn."""
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd you?\n/reset\nHello\n/quit\nnever\n"))
    status, out, err = call("chat", *FEW, "--steer", f"{direction}:0")
    assert (status, err) == (0, "") and "never" not in out
    assert [line for line in out.splitlines() if line.startswith("you>")] == [
        "you> Hello",
        "you> And you?",
        "you> Hello",
    ]
    assert out.count(" plain ") == out.count("d:0") == 3 and out.count("repetition") == 6
    first, _, again = out.split("you> ")[1:]
    assert first == again


def test_directions_and_adapters_of_something_else(direction, trained, refused, tmp_path):
    adapter = trained[0] / "stages" / "seed-0" / "sft" / "trained.safetensors"
    other = ("--model", "tiny-random:1", "--tokens", "3")
    refused("generate", "Hello", *other, "--steer", f"{direction}:1", line="extracted from other weights")
    refused("generate", "Hello", *other, "--adapter", adapter, line="trained on other weights")
    refused("generate", "Hello", *FEW, "--steer", f"{adapter}:1", line=f"{adapter}: holds no direction")
    refused("generate", "Hello", *FEW, "--adapter", direction, line=f"{direction}: holds 'direction', which is no part")
    tree = {"q": {"a": np.ones((2, 8, 2)), "b": np.ones((2, 2, 64)), "scale": np.ones(2)}}
    save_arrays(tmp_path / "narrow.safetensors", tree, {})
    refused("generate", "Hello", *FEW, "--adapter", tmp_path / "narrow.safetensors", line="q does not fit this model")
    (tmp_path / "torn.safetensors").write_bytes(adapter.read_bytes()[:100])
    refused("generate", "Hello", *FEW, "--adapter", tmp_path / "torn.safetensors", line="not a readable safetensors")


def test_a_report_without_results(refused, tmp_path):
    refused("report", tmp_path, line=f"{tmp_path / 'results.json'}: no results here; run `aif compare` first")
    (tmp_path / "results.json").write_text("{}")
    refused("report", tmp_path, line="results of version None, and this engine reads version 2")


def test_a_folder_that_is_in_use(trained, refused, tmp_path):
    folder, _ = trained
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    refused("run", TINY, "--out", folder, line=f"{folder}: is not empty; pass --resume")
    refused("compare", TINY, "--out", folder, line=f"{folder}: is not empty; pass --resume")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    refused("run", TINY, "--out", tmp_path, "--overwrite", line="not a run of ours")
    refused("run", TINY, "--out", tmp_path / "notes.txt", line="is a file; name a folder")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("words", [("rnu",), ("run",), ("run", TINY, "--nope"), ("generate", "x", "--tokens", "0")])
def test_words_that_no_verb_knows(words, call):
    status, out, err = call(*words)
    assert status == 2 and "Traceback" not in err + out


# Other ends


@pytest.mark.parametrize(
    "error,status,said",
    [
        (Stopped(143, Path("runs/x")), 143, "stopped; continue with --resume in runs/x\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_stopping_has_a_status_of_its_own(error, status, said, call, monkeypatch):
    def stop(*values, **options):
        raise error

    monkeypatch.setattr("aif.api.fit", stop)
    assert call("run", TINY, "--out", "unused") == (status, "", said)


def test_a_fault_of_the_engine_is_not_hidden(call, monkeypatch):
    monkeypatch.setattr("aif.api.fit", lambda *values, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("run", TINY, "--out", "unused")


def test_the_module_is_the_command():
    words = [sys.executable, "-m", "aif.cli", "config", "check", "nowhere.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: nowhere.yaml: ")


def test_an_adapter_is_found_in_the_folder_of_its_run_and_stage(trained, call, refused, tmp_path):
    stage = trained[0] / "stages" / "seed-0" / "sft"
    said = [call("generate", "Hello", *FEW, "--adapter", path) for path in (trained[0], stage)]
    assert said[0] == said[1] and said[0][0] == 0, said
    refused("generate", "Hello", *FEW, "--adapter", tmp_path, line="holds no trained.safetensors")
    for arm in ("a", "b"):
        (tmp_path / "stages" / "seed-0" / arm).mkdir(parents=True)
        (tmp_path / "stages" / "seed-0" / arm / "trained.safetensors").write_bytes(b"")
    refused("generate", "Hello", *FEW, "--adapter", tmp_path, line="several trained stages (stages/seed-0/a, ")
