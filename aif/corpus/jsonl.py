"""Lines of a JSONL file as dicts, with everything refused that JSON parsers let through and later stages trip over."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aif.errors import BadInput

DEPTH = 64
DIGITS = 4300
CHUNK = 1 << 20
SURROGATE = re.compile("[\ud800-\udfff]")
FOREIGN = {
    b"\x1f\x8b": ("compressed with gzip", "decompress it first"),
    b"\xff\xfe": ("UTF-16, not UTF-8", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16, not UTF-8", "save it as UTF-8"),
    b"PAR1": ("a parquet file", "let its name end in .parquet"),
}


def regular_file(path: str | Path) -> Path:
    """The path, once it is known to be a readable ordinary file.

    Raises:
      BadInput: it is missing, a folder, a pipe, a device, or may not be read.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise BadInput(f"{path}: this is a folder; name a file in it")
        if not stat.S_ISREG(mode):
            raise BadInput(f"{path}: this is a pipe or a device; write the data to an ordinary file")
        with path.open("rb"):
            return path
    except FileNotFoundError as error:
        raise BadInput(f"{path}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"{str(path)!r}: cannot be read ({reason}); check the path and its permissions") from error


def lines(stream: BinaryIO, max_bytes: int, digest: Any = None) -> Iterator[tuple[int, int, bytes | None]]:
    """`(number, byte offset, line)` of every line that is not blank, split on the newline byte only.

    A line longer than `max_bytes` is never held in memory: None stands for it. A byte-order mark is dropped. Every byte
    goes through `digest`.
    """
    digest = digest or hashlib.sha256()
    number = offset = 0
    while line := stream.readline(max_bytes + 1):
        number, start = number + 1, offset
        offset += len(line)
        digest.update(line)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := stream.readline(CHUNK)) and not rest.endswith(b"\n"):
                offset += len(rest)
                digest.update(rest)
            offset += len(rest)
            digest.update(rest)
            yield number, start, None
            continue
        if start == 0 and line.startswith(b"\xef\xbb\xbf"):
            line, start = line[3:], 3
        if line.strip():
            yield number, start, line


def refuse_foreign(path: Path) -> None:
    """Raise BadInput when the file's first bytes say that it is no UTF-8 text at all."""
    with path.open("rb") as stream:
        head = stream.read(4)
    for magic, (what, fix) in FOREIGN.items():
        if head.startswith(magic):
            raise BadInput(f"{path}:1: byte 0: the file is {what}; {fix}")


def parse(line: bytes, offset: int = 0) -> dict[str, Any]:
    """One line as a dict, with `sound_row` still to be asked.

    Raises:
      BadInput: "key: what; fix", without the file and line, which the caller knows.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"byte {offset + error.start}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    try:
        row = json.loads(text, **_HOOKS)
    except json.JSONDecodeError as error:
        what = "another object on the same line" if error.msg == "Extra data" else error.msg
        raise BadInput(f"column {error.pos + 1}: not JSON: {what}; write one JSON object a line") from None
    except RecursionError:
        raise BadInput(f"row: nested deeper than {DEPTH} levels; flatten it") from None
    if not isinstance(row, dict):
        raise BadInput(f"row: it is {kind_of(row)}, not an object; write one JSON object a line")
    return row


def sound_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, unless it holds lone surrogates, numbers that are not finite, or deep nesting.

    Raises:
      BadInput: as `parse`.
    """
    _walk(row, "", 1)
    return row


def kind_of(value: Any) -> str:
    """A JSON value's kind, in words, for error messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def nearest(name: str, names: Iterable[str]) -> str:
    """The question "did you mean ...?" when one of the names is close to this one, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            name = next((value for other, value in pairs if other == "id"), None)
            raise BadInput(f"{show(key)}: the key is given twice; keep one{told(name)}")
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise BadInput(f"row: a number of {len(text)} digits; write it as a string")
    return int(text)


_HOOKS: dict[str, Any] = {"object_pairs_hook": _object, "parse_int": _integer}


def told(name: Any) -> str:
    """A row's id at the end of a message; nothing where it is no name."""
    named = isinstance(name, (str, int)) and not isinstance(name, bool)
    return f" (id {str(name)[:80]!r})" if named else ""


def show(key: str) -> str:
    """A key as it stands in a message: bare when it is a plain word, else quoted and shortened."""
    return key if re.fullmatch(r"[\w.\-\[\]]{1,80}", key) else repr(key[:80])


def _walk(value: Any, key: str, depth: int) -> None:
    """Refuse lone surrogates, numbers that are not finite and deep nesting anywhere in a row."""
    if depth > DEPTH and isinstance(value, (dict, list)):
        raise BadInput(f"{show(key[:40])}: nested deeper than {DEPTH} levels; flatten it")
    if isinstance(value, str):
        if found := SURROGATE.search(value):
            code = f"\\u{ord(found.group()):04x}"
            raise BadInput(f"{show(key)}: half of a surrogate pair, {code}, is no character; remove it")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{show(key)}: {value} is no finite number; write one that a float can hold, or null")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _walk(name, f"{key}.key" if key else "key", depth)
            _walk(inner, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _walk(inner, f"{key}[{number}]", depth + 1)


__all__ = ["kind_of", "lines", "nearest", "parse", "refuse_foreign", "regular_file", "show", "sound_row", "told"]
