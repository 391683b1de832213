"""Rating scales as data: the Nexus Scale, or a YAML file of your own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aif.corpus.jsonl import nearest, regular_file
from aif.errors import BadInput

MAX_BYTES = 1 << 20


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
        return _scale(Path(__file__).with_name(f"{name}.yaml"))
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join(built_in)
        raise BadInput(f"scale: no scale is called {name!r}{nearest(name, built_in)}; use {known} or a .yaml file")
    return _scale(regular_file(name))


class _Loader(yaml.BaseLoader):
    """Safe YAML whose scalars are all text; a key given twice and an alias are refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, "a key is given twice or is no word", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not read here", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _scale(path: Path) -> Scale:
    with path.open("rb") as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise BadInput(f"{path}: larger than 1 MiB; a scale is a small file")
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506  a BaseLoader makes text, lists and dicts only
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{path}:{line}: not YAML: {error.problem}; mend this line") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        what = " ".join(str(error).split())[:120]
        raise BadInput(f"{path}:1: not YAML: {what}; write it as plain UTF-8 YAML") from None
    try:
        return _checked(tree)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _checked(tree: Any) -> Scale:
    _keys(tree, "scale", required=("name", "levels", "dimensions"))
    levels = _words(tree["levels"], "levels")
    if len(levels) < 2:
        raise BadInput("levels: a scale has two levels or more; list them from lowest to highest")
    if not isinstance(tree["dimensions"], list) or not tree["dimensions"]:
        raise BadInput("dimensions: must be a list of at least one dimension; see nexus.yaml for an example")
    dimensions = tuple(_dimension(d, f"dimensions[{k}]", levels) for k, d in enumerate(tree["dimensions"]))
    _words([d.id for d in dimensions], "dimensions")
    return Scale(_word(tree["name"], "name"), levels, dimensions)


def _dimension(entry: Any, key: str, levels: tuple[str, ...]) -> Dimension:
    _keys(entry, key, required=("id",), optional=("name", "rubric"))
    found = _word(entry["id"], f"{key}.id")
    rubric = entry.get("rubric", [])
    if not isinstance(rubric, list) or len(rubric) not in (0, len(levels)):
        raise BadInput(f"{key}.rubric: must be a list of {len(levels)} sentences, one per level, or be left out")
    sentences = tuple(_word(s, f"{key}.rubric[{k}]") for k, s in enumerate(rubric))
    return Dimension(found, _word(entry.get("name", found), f"{key}.name"), sentences)


def _keys(value: Any, key: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    known = required + optional
    if not isinstance(value, dict):
        raise BadInput(f"{key}: must be a mapping with {', '.join(known)}; see nexus.yaml for an example")
    for name in value:
        if name not in known:
            raise BadInput(f"{key}: unknown key {name!r}{nearest(name, known)}; use {', '.join(known)}")
    for name in required:
        if name not in value:
            raise BadInput(f"{key}: {name} is missing; give {', '.join(required)}")


def _word(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{key}: must be text that is not empty; write it in quotes")
    return value


def _words(values: Any, key: str) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise BadInput(f"{key}: must be a list; write [low, high]")
    words = tuple(_word(v, f"{key}[{k}]") for k, v in enumerate(values))
    twice = next((w for w in words if words.count(w) > 1), None)
    if twice is not None:
        raise BadInput(f"{key}: {twice!r} is listed twice; keep one")
    return words


__all__ = ["Dimension", "Scale", "load_scale"]
