"""What may import what: the order of the layers, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "aif"
FILES = sorted([*ROOT.rglob("*.py"), *(ROOT / "models").rglob("*.py")])  # models is a link to a folder beside aif


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, inside functions too."""
    package = ("aif", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            before = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*before, *([node.module] if node.module else [])))
            inside = [f"{module}.{a.name}" for a in node.names]
            modules = [m for m in inside if _is_module(m)]
            found |= set(modules) if len(modules) == len(inside) else {module, *modules}
    return {name for name in found if name.split(".")[0] == "aif"}


def _is_module(name: str) -> bool:
    place = ROOT.parent.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def under(folder: str) -> list[Path]:
    files = [f for f in FILES if f.relative_to(ROOT).parts[0] == folder]
    assert files, folder
    return files


def within(name: str, *allowed: str) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def test_the_parser_sees_every_kind_of_import(tmp_path):
    assert "aif.objectives.logprobs" in imported(ROOT / "objectives" / "dpo.py")
    assert "aif.models.decoder" in imported(ROOT / "models" / "hub.py")  # relative
    assert "aif.train" in imported(ROOT / "experiment.py")
    assert "aif.results" in imported(ROOT / "comparison.py")  # from aif import results


@pytest.mark.parametrize("path", under("models"), ids=lambda p: p.stem)
def test_models_know_types_and_errors_only(path):
    assert {n for n in imported(path) if not within(n, "aif.models", "aif.types", "aif.errors")} == set()


@pytest.mark.parametrize("path", under("report"), ids=lambda p: p.stem)
def test_the_report_knows_results_and_errors_only(path):
    assert {n for n in imported(path) if not within(n, "aif.report", "aif.results", "aif.errors")} == set()


ABOVE = ("aif.train", "aif.experiment", "aif.comparison", "aif.api", "aif.cli", "aif.config", "aif.checkpoint")


@pytest.mark.parametrize("folder", ["objectives", "models", "corpus"])
def test_the_lower_layers_never_import_training(folder):
    for path in under(folder):
        assert {n for n in imported(path) if within(n, *ABOVE)} == set(), path


@pytest.mark.parametrize(
    "name", ["types", "errors", "adapter", "free_energy", "policy", "steering", "tokens", "batches"]
)
def test_the_words_and_the_mathematics_never_import_training(name):
    assert {n for n in imported(ROOT / f"{name}.py") if within(n, *ABOVE)} == set()


def test_training_knows_no_experiment_and_no_single_objective():
    known = imported(ROOT / "train.py")
    assert not {n for n in known if within(n, "aif.experiment", "aif.comparison", "aif.api", "aif.cli", "aif.config")}
    assert {n for n in known if within(n, "aif.objectives")} == {"aif.objectives"}


def test_only_the_door_imports_the_command_line():
    assert [p.name for p in FILES if "aif.cli" in imported(p)] == ["__main__.py"]


def test_no_module_is_a_drawer():
    names = {p.stem for p in FILES} | {p.name for p in ROOT.rglob("*") if p.is_dir()}
    assert names.isdisjoint({"utils", "util", "common", "helpers", "helper", "misc"})


def test_every_module_says_what_it_is():
    assert [str(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))] == []
