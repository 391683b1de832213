"""Rating scales as data: the Nexus Scale, or a YAML file of your own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.corpus.jsonl import nearest
from aif.corpus.yaml_tree import keys, load, word, words
from aif.errors import BadInput


@dataclass(frozen=True)
class Dimension:
    """One thing that is rated; `rubric[k]` says what level k looks like (empty when the scale gives none)."""

    id: str
    name: str
    rubric: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """A rating instrument: levels from lowest to highest, and the dimensions rated on them."""

    name: str
    levels: tuple[str, ...]
    dimensions: tuple[Dimension, ...]


def load_scale(path_or_name: str | Path = "nexus") -> Scale:
    """A scale that comes with the package, by name, or one from a YAML file.

    The file has `name`, `levels` (two or more words, lowest first) and `dimensions` (each with `id`, and if wished
    `name` and `rubric`, one sentence per level). Every scalar is read as text, so that `no` is a word.

    Raises:
      BadInput: there is no such scale, or the file is not one; the message names the file and the key or line.
    """
    name = str(path_or_name)
    built_in = sorted(p.stem for p in Path(__file__).parent.glob("*.yaml"))
    if name in built_in:
        return load(Path(__file__).with_name(f"{name}.yaml"), _checked, "a scale")
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join(built_in)
        raise BadInput(f"scale: no scale is called {name!r}{nearest(name, built_in)}; use {known} or a .yaml file")
    return load(name, _checked, "a scale")


def _checked(tree: Any) -> Scale:
    keys(tree, "scale", required=("name", "levels", "dimensions"))
    levels = words(tree["levels"], "levels")
    if len(levels) < 2:
        raise BadInput("levels: a scale has two levels or more; list them from lowest to highest")
    if not isinstance(tree["dimensions"], list) or not tree["dimensions"]:
        raise BadInput("dimensions: must be a list of at least one dimension; see nexus.yaml for an example")
    dimensions = tuple(_dimension(d, f"dimensions[{k}]", levels) for k, d in enumerate(tree["dimensions"]))
    words([d.id for d in dimensions], "dimensions")
    return Scale(word(tree["name"], "name"), levels, dimensions)


def _dimension(entry: Any, key: str, levels: tuple[str, ...]) -> Dimension:
    keys(entry, key, required=("id",), optional=("name", "rubric"))
    found = word(entry["id"], f"{key}.id")
    rubric = entry.get("rubric", [])
    if not isinstance(rubric, list) or len(rubric) not in (0, len(levels)):
        raise BadInput(f"{key}.rubric: must be a list of {len(levels)} sentences, one per level, or be left out")
    sentences = tuple(word(s, f"{key}.rubric[{k}]") for k, s in enumerate(rubric))
    return Dimension(found, word(entry.get("name", found), f"{key}.name"), sentences)


__all__ = ["Dimension", "Scale", "load_scale"]
