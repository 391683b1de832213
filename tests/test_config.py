"""Configs: every file loads, every key is read, and every mistake is one line that names its place and its remedy."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from aif.config import Config, check, load
from aif.errors import BadInput
from aif.plugins import available, nearest, plugin

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(f for f in (ROOT / "configs").rglob("*.y*ml") if not f.read_text().startswith("# kubectl"))
OURS = [f for f in FILES if f.read_text().startswith("# aif ")]  # the others are read by a benchmark of their own
ARM = "arms:\n  only: {objective: {name: sft}, steps: 4}\n"
TREE = yaml.safe_load(ARM)


def written(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


# What is right


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_config_says_its_command_hardware_and_time(file):
    comment = "".join(line for line in file.read_text().splitlines(True) if line.startswith("#"))
    first = comment.splitlines()[0].split()
    assert first[1] == "aif" or first[1] == "python" and (ROOT / first[2]).is_file()
    assert str(file.relative_to(ROOT)) in first
    assert re.search(r"cores?|GPU|TPU|H100", comment) and re.search(r"minute|hour|second", comment)


@pytest.mark.parametrize("file", OURS, ids=lambda f: f.stem)
def test_every_config_loads_and_says_itself_again(file):
    config = load(file)
    assert check(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_there_are_configs():
    assert {"tiny", "quickstart"} <= {f.stem for f in OURS}


def test_defaults_are_filled_in(tmp_path):
    config = load(written(tmp_path, ARM))
    assert config == check(TREE)
    assert config.optimizer.learning_rate == 1e-3 and config.seeds == (0,) and config.baseline == ""
    assert config.arms["only"].objective.options == {} and config.arms["only"].steps == 4
    with pytest.raises(ValueError):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


NUMBERS = {"1e-4": 1e-4, "1E-4": 1e-4, "2.5e-4": 2.5e-4, "+1e+0": 1.0, ".5e0": 0.5, "3": 3.0, "0.1": 0.1}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them(text, tmp_path):
    assert (
        load(written(tmp_path, ARM + f"optimizer: {{learning_rate: {text}}}")).optimizer.learning_rate == NUMBERS[text]
    )


OVERRIDES = {
    "seed=3": lambda c: c.seed == 3,
    "optimizer.learning_rate=1e-4": lambda c: c.optimizer.learning_rate == 1e-4,
    "arms.only.steps=9": lambda c: c.arms["only"].steps == 9,
    "arms.only.objective={name: dpo, beta: 0.3}": lambda c: c.arms["only"].objective.options == {"beta": 0.3},
    "arms.more={objective: {name: sft}, steps: 1}": lambda c: list(c.arms) == ["only", "more"],
    "seeds=[4, 5]": lambda c: c.seeds == (4, 5),
    "adapter.layers=[0]": lambda c: c.adapter.layers == (0,),
    "corpus.columns.prompt=question": lambda c: c.corpus.columns == {"prompt": "question"},
    "name=a.b-c": lambda c: c.name == "a.b-c",
    "corpus.path=a=b.jsonl": lambda c: c.corpus.path == "a=b.jsonl",
    "seed=${resamples}": lambda c: c.seed == 7,
    "name=run-${resamples}": lambda c: c.name == "run-7",
    "seed=${arms.only.steps}": lambda c: c.seed == 4,
    "~resamples": lambda c: c.resamples == 2000,
    "~batch.rows": lambda c: c.batch.rows == 2 and c.batch.length == 99,
    "measure.efficiency.factors=[1, 2.5]": lambda c: c.measure == {"efficiency": {"factors": [1, 2.5]}},
}


@pytest.mark.parametrize("item", OVERRIDES)
def test_overrides(item, tmp_path):
    config = load(written(tmp_path, ARM + "resamples: 7\nbatch: {rows: 5, length: 99}\n"), [item])
    assert OVERRIDES[item](config)


def test_overrides_apply_in_turn(tmp_path):
    assert load(written(tmp_path, ARM), ["seed=1", "seed=2", "name=s${seed}", "seed=3"]).name == "s3"


# What is wrong

BAD_FILES = {
    "empty": ("", "a config is a mapping"),
    "a comment": ("# nothing yet\n", "a config is a mapping"),
    "a list": ("- 1\n", "holds list"),
    "a word": ("hello\n", "holds str"),
    "not closed": ("arms: {a: \n", r"^FILE:2: .*mend the YAML"),
    "tab": ("a:\n\t- 1", r"^FILE:2: .*'\\t'"),
    "twice": (ARM + "seed: 1\nseed: 2\n", r"^FILE:4: key 'seed' is given twice"),
    "twice below": ("arms:\n  a: {objective: {name: sft}, steps: 2, steps: 3}\n", r"^FILE:2: key 'steps'"),
    "alias": ("seed: &n 1\nresamples: *n\n" + ARM, r"aliases are not read; use \$\{key\}"),
    "merge": ("x: &n {seed: 1}\n<<: *n\n" + ARM, "aliases are not read"),
    "merge of a mapping": ("<<: {seed: 1}\n" + ARM, "^FILE:1: "),
    "two documents": (ARM + "---\nseed: 1\n", r"^FILE:3: "),
    "python tag": (ARM + "name: !!python/object/apply:os.getcwd []\n", r"^FILE:3: could not determine a constructor"),
    "list as a key": ("? [a]\n: 1\n", r"^FILE:1: a key is a word"),
    "no date": (ARM + "name: 2024-99-01\n", r"^FILE:3: month must be"),
    "no number": (ARM + f"seed: {'9' * 5000}\n", r"^FILE:3: Exceeds the limit"),
    "too deep": ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
    "NUL": (ARM + "name: \0\n", "not valid YAML"),
    "latin-1": ("name: caf\xe9\n".encode("latin-1"), "not valid YAML"),
    "too large": ("# " + "x" * (1 << 20), "too large for a config"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(what, tmp_path):
    text, message = BAD_FILES[what]
    file = written(tmp_path, text)
    with pytest.raises(BadInput, match=message.replace("FILE", re.escape(str(file)))) as error:
        load(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_a_place_that_is_no_file(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere.yaml", tmp_path / "nowhere" / "c.yaml"):
        with pytest.raises(BadInput, match=rf"^{place}: cannot be read \(.*\); name a YAML file$"):
            load(place)


def one(objective: str) -> str:
    return f"arms: {{only: {{objective: {objective}, steps: 4}}}}\n"


BAD_KEYS = {
    "sed: 1": r"sed: unknown key, did you mean 'seed'\?; keys here are name, seed, ",
    "model: {sorce: x}": r"model\.sorce: unknown key, did you mean 'source'\?; keys here are source, ",
    "optimizer: {lr: 1e-3}": r"optimizer\.lr: unknown key.*; keys here are learning_rate, ",
    "start: {objective: {name: sft}, step: 2, steps: 1}": r"start\.step: unknown key, did you mean 'steps'",
    "optimizer: {learning_rate: .nan}": r"optimizer\.learning_rate: nan stands here",
    "optimizer: {eps: .inf}": r"optimizer\.eps: inf stands here",
    "optimizer: {learning_rate: 0}": r"optimizer\.learning_rate: .*greater than 0, not 0",
    "optimizer: {learning_rate: fast}": r"optimizer\.learning_rate: .*valid number.*, not 'fast'",
    "optimizer: {b2: 1.0}": r"optimizer\.b2: .*less than 1",
    "optimizer: {clip: -1}": r"optimizer\.clip: ",
    "optimizer: {schedule: step}": r"optimizer\.schedule: .*'cosine', 'linear' or 'constant'",
    "optimizer: {warmup: 5}": r"only: optimizer\.warmup=5 is longer than steps=4",
    "start: {objective: {name: sft}, steps: 4, optimizer: {warmup: 9}}": r"start: optimizer\.warmup=9",
    "optimizer: 3": r"optimizer: .*, not 3",
    "seed: yes": r"seed: true stands here \(YAML reads yes",
    "seed: 1.5": r"seed: .*valid integer",
    "seed: -1": r"seed: .*greater than or equal to 0",
    "seed: 4294967296": r"seed: .*less than 4294967296",
    "seed:": r"seed: .*, not None",
    "seeds: [yes]": r"seeds: true stands here",
    "seeds: []": r"seeds: .*at least 1 item",
    "seeds: [1, 2, 1]": r"seeds: a seed is given twice",
    "adapter: {layers: [off]}": r"adapter\.layers: false stands here",
    "adapter: {rank: 0}": r"adapter\.rank: ",
    "adapter: {targets: q}": r"adapter\.targets: ",
    "batch: {rows: 0}": r"batch\.rows: ",
    "log: {tensorboard: 3}": r"log\.tensorboard: ",
    "name: no": r"name: false stands here .*; quote text",
    "name: ../up": r"name: .*pattern",
    "name: ''": r"name: .*pattern",
    "baseline: other": r"baseline: no arm is called 'other'; arms are only",
    "name: ${nowhere}": r"name: Interpolation key 'nowhere' not found; check .* references",
    "name: ${name}": r"name: Recursive interpolation",
    "measure: {efficency: {}}": r"measure\.efficency: no metric is called 'efficency', did you mean 'efficiency'\?; ",
    "measure: {efficiency: }": r"measure\.efficiency: .*, not None",
    "measure: {efficiency: {factor: [1]}}": r"measure\.efficiency: factor: unknown key, did you mean 'factors'",
    "measure: {efficiency: {factors: [.nan]}}": r"measure\.efficiency: factors: nan stands here",
    "measure: {efficiency: {factors: [yes]}}": r"measure\.efficiency: factors: true stands here",
}

BAD_ARMS = {
    "arms: {}": r"arms: .*at least 1 item",
    "arms:": r"arms: .*, not None",
    "seed: 1": r"arms: Field required",
    "arms: [sft]": r"arms: .*, not \['sft'\]",
    "arms: {only: }": r"arms\.only: .*, not None",
    "arms: {a/b: {objective: {name: sft}, steps: 1}}": r"arms\.a/b: not a name for an arm",
    "arms: {..: {objective: {name: sft}, steps: 1}}": r"arms\.\.\.: not a name for an arm",
    "arms: {start: {objective: {name: sft}, steps: 1}}": r"arms\.start: not a name for an arm; .*`start`",
    "arms: {only: {objective: {name: sft}}}": r"arms\.only\.steps: Field required",
    "arms: {only: {objective: {name: sft}, steps: yes}}": r"arms\.only\.steps: true stands here",
    one("sft"): r"arms\.only\.objective: .*, not 'sft'",
    one("{nme: sft}"): r"arms\.only\.objective\.name: Field required",
    one("{name: stf}"): r"arms\.only\.objective: no objective is called 'stf', did you mean 'sft'\?; there are ",
    one("{name: ../errors}"): r"arms\.only\.objective: no objective is called '../errors'",
    one("{name: sft, beta: 1}"): r"arms\.only\.objective: beta: unknown key; keys here are none",
    one("{name: dpo, bta: 1}"): r"arms\.only\.objective: bta: unknown key, did you mean 'beta'",
    one("{name: dpo, beta: -1}"): r"arms\.only\.objective: beta: .*greater than 0, not -1",
    one("{name: dpo, beta: yes}"): r"arms\.only\.objective: beta: true stands here",
    one("{name: dpo, beta: .nan}"): r"arms\.only\.objective: beta: nan stands here",
    one("{name: dpo, label_smoothing: much}"): r"arms\.only\.objective: label_smoothing: .*, not 'much'",
}


@pytest.mark.parametrize("text", [*BAD_KEYS, *BAD_ARMS])
def test_a_bad_key_is_named(text, tmp_path):
    message = {**BAD_KEYS, **BAD_ARMS}[text]
    with pytest.raises(BadInput, match=rf"(^|: ){message}") as error:
        load(written(tmp_path, text if text in BAD_ARMS else ARM + text))
    assert "\n" not in str(error.value)


BAD_OVERRIDES = {
    "seed": r"^seed: an override reads key\.sub=value, or ~key",
    "sed=1": r"sed: unknown key, did you mean 'seed'",
    "arms.only.stps=1": r"arms\.only\.stps: unknown key, did you mean 'steps'",
    "=1": r"unknown key",
    "seed=": r"seed: .*, not None",
    "seed.below=1": r"seed: .*, not \{'below': 1\}",
    "seed=yes": r"seed: true stands here",
    "seed=[": r"^seed=\[: .*; check the overrides",
    "seed=*n": r"^seed=\*n: found undefined alias",
    "seed={[1]: 2}": r"^seed=.*: a key is a word",
    "seed=2024-99-01": r"^seed=2024-99-01: month must be",
    "name=${nowhere}": r"^name: Interpolation key 'nowhere' not found",
    "~": r"^~: there is no such key to delete",
    "~seed": r"^~seed: there is no such key to delete",
    "~arms.other": r"^~arms\.other: there is no such key",
    "~a.b.c": r"^~a\.b\.c: there is no such key",
    "~arms.only": r"arms: .*at least 1 item",
    "~arms": r"arms: Field required",
}


@pytest.mark.parametrize("item", BAD_OVERRIDES)
def test_a_bad_override_is_named(item, tmp_path):
    with pytest.raises(BadInput, match=BAD_OVERRIDES[item]) as error:
        load(written(tmp_path, ARM), [item])
    assert "\n" not in str(error.value)


def test_the_first_of_many_mistakes_is_shown_and_the_rest_counted():
    with pytest.raises(BadInput, match=r"^config: batch\.rows: .*\(and 2 more\)$"):
        check({**TREE, "batch": {"rows": 0, "length": 0, "accumulate": 0}})


# Schema and plugins


def fields(model: type[BaseModel], seen: set[type]) -> dict[str, str]:
    """Every key of a section and of the sections below it, with the section's name."""
    found = {}
    seen.add(model)
    for name, field in model.model_fields.items():
        found[f"{model.__name__}.{name}"] = name
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen:
                found |= fields(part, seen)
    return found


READ = [p for p in (ROOT / "aif").rglob("*.py") if p.name != "config.py"]
SOURCE = "\n".join(p.read_text() for p in READ)


@pytest.mark.parametrize("key", fields(Config, set()))
def test_every_key_is_read_somewhere(key):
    assert re.search(rf"\.{key.rpartition('.')[2]}\b", SOURCE), f"no file but config.py reads {key}"


def test_the_walk_reaches_every_section():
    sections = {key.partition(".")[0] for key in fields(Config, set())}
    assert {"Config", "Model", "Stage", "OptimizerSection", "SamplesSection", "Named"} <= sections


PACKAGES = ("objectives", "readers", "basins")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_option_is_read_somewhere(package):
    """By its name as an attribute or a key, or by a function that takes all options as its parameters."""
    unread = []
    for name in available(package):
        keys = fields(import_module(f"aif.{package}.{name}").Options, set()).values()
        read = r"\.{0}\b|\"{0}\"|^ +{0}: .*,$".format
        unread += [f"{package}/{name}: {key}" for key in keys if not re.search(read(key), SOURCE, re.MULTILINE)]
    assert unread == []


@pytest.mark.parametrize("package", PACKAGES)
def test_plugins_are_found_by_their_files(package):
    known = {"objectives": {"sft", "dpo", "efe"}, "readers": {"ratings"}, "basins": {"efficiency", "stability"}}
    assert known[package] <= set(available(package))
    for name in available(package):
        module = import_module(f"aif.{package}.{name}")
        assert issubclass(module.Options, BaseModel) and module.Options.model_config.get("extra") == "forbid"
        assert callable(module.measure if package == "basins" else module.make)
    assert plugin("objectives", "my.module:mine", {"any": 1}, "here") == (None, {"any": 1})


def test_the_nearest_name():
    assert nearest("sed", ["name", "seed"]) == ", did you mean 'seed'?"
    assert nearest("zzz", ["name", "seed"]) == ""


def test_the_schema_describes_every_section():
    schema = Config.model_json_schema()
    assert schema["properties"].keys() == Config.model_fields.keys()
    assert all(s.get("additionalProperties") is not None for s in schema["$defs"].values())
