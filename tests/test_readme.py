"""What the README says is so: its code runs, its commands parse, and its paths, names and targets exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

import aif
from aif.cli import app
from aif.config import load
from aif.plugins import available

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def commands(text: str) -> list[str]:
    """Every `aif ...` line, without what it says of itself in brackets."""
    return [line.strip().partition("  (")[0] for line in text.splitlines() if line.strip().startswith("aif ")]


# Code


def test_the_objective_of_ones_own_runs_as_written(monkeypatch, capsys):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    monkeypatch.chdir(ROOT)
    before = {p.name for p in ROOT.iterdir()}
    names: dict = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    name, loss = capsys.readouterr().out.split()
    assert name == names["solution"].name and 0 < float(loss) < 20
    assert isinstance(names["mine"], aif.Objective)
    assert {p.name for p in ROOT.iterdir()} == before  # without `out` nothing is written


# Commands


def parsed(line: str) -> tuple[list[str], dict]:
    """The verb and the values of its parameters, as the command line itself reads them; nothing is run."""
    words, verb, command = shlex.split(line, comments=True)[1:], [], typer.main.get_command(app)
    while subcommands := getattr(command, "commands", None):
        assert words and words[0] in subcommands, f"{line}: no such verb; there are {', '.join(subcommands)}"
        verb.append(words[0])
        command = subcommands[words.pop(0)]
    return verb, command.make_context(" ".join(verb), words).params


OF_README = [line for block in blocks("sh") for line in commands(block)]
OF_CONFIGS = [
    line for f in sorted((ROOT / "configs").glob("*.yaml")) for line in commands(f.read_text().replace("# ", ""))
]
OF_MAKEFILE = commands(MAKEFILE.replace("$(BIN)/", "").replace("$(OUT)", "runs/demo"))


@pytest.mark.parametrize("line", [*OF_README, *OF_CONFIGS, *OF_MAKEFILE])
def test_every_command_parses(line):
    """Its verb and options exist; so do its config, the keys that it overrides and its arm."""
    verb, values = parsed(line)
    if verb[0] in ("run", "compare"):
        config = load(ROOT / values["file"], values["overrides"] or [])
        assert values.get("arm") in (None, *config.arms)


def test_there_are_commands_and_a_wrong_one_is_noticed():
    assert len(OF_README) >= 5 and OF_CONFIGS and OF_MAKEFILE
    assert {parsed(line)[0][0] for line in OF_README} >= {"run", "compare", "generate", "corpus", "models"}
    for wrong in ("aif train x.yaml", "aif models fetch"):
        with pytest.raises((AssertionError, SystemExit, Exception), match="no such verb|[Mm]issing"):
            parsed(wrong)
    with pytest.raises(Exception, match="(?i)no such option"):
        parsed("aif run configs/tiny.yaml --nope")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_target_of_make_exists(page):
    text = (ROOT / page).read_text()
    code = blocks("sh", text) + re.findall(r"`([^`\n]+)`", text)
    wanted = {target for piece in code for target in re.findall(r"^make ([\w./-]+)", piece, re.MULTILINE)}
    rules = re.findall(r"^([^\s:#=]+):(?!=)", MAKEFILE.replace("$(VENV)", ".venv"), re.MULTILINE)
    assert wanted and wanted <= set(rules)
    assert page != "README.md" or {"demo", "test"} <= wanted


# Paths and names


def tree() -> list[str]:
    """Paths of the tree block; an indented one lies in the folder above it."""
    found, parent = [], ""
    for line in blocks("", section("The tree"))[0].splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else name
        found.append(parent + name if line.startswith(" ") else name)
    return found


@pytest.mark.parametrize("path", tree())
def test_every_path_of_the_tree_exists(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_every_module_is_in_the_tree():
    names = {
        p.name if p.suffix else f"{p.name}/" for p in (ROOT / "aif").iterdir() if not p.name.startswith(("_", "."))
    }
    names.discard("models/")  # a link to the folder beside aif
    assert {f"aif/{name}" for name in names} - set(tree()) == set()


def test_every_line_of_the_tree_says_what_the_file_is_for():
    for line in blocks("", section("The tree"))[0].splitlines()[1:]:
        assert len(line.split()) > 2, line


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


def first_column(title: str) -> set[str]:
    rows = re.findall(r"^\| *([^|]+?) *\|", section(title), re.MULTILINE)[2:]
    return {name.strip("`") for name in rows}


@pytest.mark.parametrize("title,package", [("The objectives", "objectives"), ("What is measured", "basins")])
def test_the_tables_name_what_configs_can_name(title, package):
    assert first_column(title) == set(available(package))


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {x for part in re.findall(r"(?:aif|\.)\[([\w,]+)\]", README) for x in part.split(",")}
    assert named and named <= set(extras)
    assert {"cuda", "tpu"} <= set(extras)
