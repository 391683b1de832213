"""Small YAML files as data: every scalar is text, and every mistake is one line that names the file and key or line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from aif.corpus.jsonl import nearest, regular_file
from aif.errors import BadInput

MAX_BYTES = 1 << 20
T = TypeVar("T")


def load(path: str | Path, checked: Callable[[Any], T], what: str) -> T:
    """What `checked` makes of the file's tree; `what` is the kind of file in words, such as "a scale".

    Raises:
      BadInput: unreadable, not YAML, or refused by `checked`.
    """
    path = regular_file(path)
    with path.open("rb") as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise BadInput(f"{path}: larger than 1 MiB; {what} is a small file")
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506  a BaseLoader makes text, lists and dicts only
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{path}:{line}: not YAML: {error.problem}; mend this line") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())[:120]
        raise BadInput(f"{path}:1: not YAML: {said}; write it as plain UTF-8 YAML") from None
    try:
        return checked(tree)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


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


def keys(value: Any, key: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse what is no mapping with these keys."""
    known = required + optional
    if not isinstance(value, dict):
        raise BadInput(f"{key}: must be a mapping; give it {', '.join(known)}")
    for name in value:
        if name not in known:
            raise BadInput(f"{key}: unknown key {name!r}{nearest(name, known)}; use {', '.join(known)}")
    for name in required:
        if name not in value:
            raise BadInput(f"{key}: {name} is missing; give {', '.join(required)}")


def word(value: Any, key: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{key}: must be text that is not empty; write it in quotes")
    return value


def words(values: Any, key: str) -> tuple[str, ...]:
    """A list of different texts."""
    if not isinstance(values, list):
        raise BadInput(f"{key}: must be a list; write [low, high]")
    found = tuple(word(v, f"{key}[{k}]") for k, v in enumerate(values))
    twice = next((w for w in found if found.count(w) > 1), None)
    if twice is not None:
        raise BadInput(f"{key}: {twice!r} is listed twice; keep one")
    return found


__all__ = ["keys", "load", "word", "words"]
