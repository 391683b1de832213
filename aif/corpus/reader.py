"""Reading a corpus file: every row checked, every problem named by file, line and key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from aif.corpus import parquet
from aif.corpus.conversation import Conversation, Corpus
from aif.corpus.formats import NAMES, conversation
from aif.corpus.jsonl import lines, nearest, parse, refuse_foreign, regular_file, sound_row, told
from aif.corpus.nexus import Scale
from aif.errors import BadInput

MAX_LINE_BYTES = 8 << 20


def read(
    path: str | Path,
    *,
    scale: Scale | None = None,
    columns: dict[str, str] | None = None,
    on_bad_row: str = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Corpus:
    """Read a corpus, JSONL or .parquet; formats.py lists the formats, told apart by their keys.

    Args:
      scale: the instrument that ratings are checked against; without it, any level from 0 up is taken.
      columns: our name: the file's name, for files that call a key otherwise. A key of ours that a renamed one
        replaces is left out.
      on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and lists them in `Corpus.skipped`.
      max_line_bytes: longer lines are bad rows and are never held in memory.

    Raises:
      BadInput: one line, "file:line: key: what is wrong; how to fix it"; the number of further bad rows at its end.
    """
    if on_bad_row not in ("error", "skip"):
        raise BadInput(f"on_bad_row: {on_bad_row!r} is not known; use error or skip")
    _check_columns(columns or {})
    path = regular_file(path)
    digest = hashlib.sha256()
    rows: dict[str, Conversation] = {}
    bad: list[str] = []
    read_rows = _tabled(path, digest) if path.suffix == ".parquet" else _lines(path, digest, max_line_bytes)
    for where, found in _found(read_rows, scale, columns or {}):
        if isinstance(found, str):
            bad.append(found)
        elif found.id in rows:
            first = rows[found.id].where
            bad.append(f"{where}: id: {found.id!r} was used before, at {first}; give every row an id of its own")
        else:
            rows[found.id] = found
    if bad and on_bad_row == "error":
        more = f" (and {len(bad) - 1} more bad row{'s' if len(bad) > 2 else ''})" if len(bad) > 1 else ""
        raise BadInput(bad[0] + more)
    if not rows:
        reason = f"all {len(bad)} rows are bad, the first: {bad[0]}" if bad else "the file has no rows"
        raise BadInput(f"{path}: {reason}; give a JSONL file with one object a line")
    return Corpus(tuple(rows.values()), tuple(bad), path, digest.hexdigest())


def _found(
    rows: Iterator[tuple[str, Callable[[], dict[str, Any]]]], scale: Scale | None, columns: dict[str, str]
) -> Iterator[tuple[str, Conversation | str]]:
    """`(file:line, conversation or the message that says what is wrong)` of every row."""
    for where, parsed in rows:
        row: dict[str, Any] = {}
        try:
            row = _renamed(parsed(), columns)
            yield where, conversation(sound_row(row), where, scale)
        except BadInput as error:
            yield where, f"{where}: {error}{told(row.get('id'))}"


def _lines(path: Path, digest: Any, max_bytes: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """`(file:line, what parses it)` of every line that is not blank."""

    def parsed(line: bytes | None, offset: int) -> dict[str, Any]:
        if line is None:
            raise BadInput(f"row: longer than {max_bytes} bytes; split it or raise the limit")
        return parse(line, offset)

    refuse_foreign(path)
    with path.open("rb") as stream:
        for number, offset, line in lines(stream, max_bytes, digest):
            yield f"{path}:{number}", partial(parsed, line, offset)


def _tabled(path: Path, digest: Any) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The same for the rows of a parquet file, numbered from 1."""
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    for number, row in enumerate(parquet.rows(path), 1):
        yield f"{path}:{number}", partial(dict, row)


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under our names."""
    ours = {theirs: name for name, theirs in columns.items() if theirs in row}
    kept = {key: value for key, value in row.items() if key not in ours and key not in ours.values()}
    return {**kept, **{name: row[theirs] for theirs, name in ours.items()}}


def _check_columns(columns: dict[str, str]) -> None:
    for name, theirs in columns.items():
        if name not in NAMES:
            raise BadInput(f"columns.{name}: no name of ours{nearest(name, NAMES)}; use {', '.join(NAMES)}")
        if not isinstance(theirs, str):
            raise BadInput(f"columns.{name}: must be the name of a key of the file; write it in quotes")
    twice = next((t for t in columns.values() if list(columns.values()).count(t) > 1), None)
    if twice is not None:
        raise BadInput(f"columns: {twice!r} is given two names; keep one")


__all__ = ["read"]
