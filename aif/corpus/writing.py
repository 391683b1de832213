"""Conversations written in any of the formats that `read` takes; ratings and unknown keys go along.

- candidates: the project's own, with all answers of a prompt
- messages, sharegpt: a whole conversation ending in one answer
- completion: prompt and one answer
- columns: prompt, response and one whole-number column per rated dimension, as in HelpSteer
- pair: prompt, chosen and rejected
- text: an answer's words alone
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aif.corpus import parquet
from aif.corpus.conversation import Candidate, Conversation, Message
from aif.corpus.jsonl import nearest
from aif.corpus.tiers import target_of
from aif.errors import BadInput

Row = dict[str, Any]
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}


def convert(rows: Sequence[Conversation], to: str, target: str) -> list[Row]:
    """The rows as dicts of the format `to`. A format with one answer takes the target's; a pair sets the target
    against each other answer in a row of its own.

    Raises:
      BadInput: no such format, or a row does not fit it.
    """
    if to not in FORMATS:
        raise BadInput(f"to: no format is called {to!r}{nearest(to, FORMATS)}; there are {', '.join(FORMATS)}")
    return [made for row in rows for made in FORMATS[to](row, target)]


def write(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, or as parquet where the name ends so; whole or not at all.

    Raises:
      BadInput: the file cannot be written, or parquet is not installed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".parquet":
            parquet.write(temporary, rows)
        else:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); check the folder") from error


def own(row: Conversation) -> Row:
    """A conversation in the spelling it is read back from without loss: candidates, or messages where every turn of
    the assistant is trained, or text."""
    if row.kind == "text" or (row.kind == "scaffolding" and not row.prompt):
        return _about(row, {"text": row.candidates[0].content}, row.candidates[0])
    if row.train_turns:
        return _about(row, {"messages": _messages([*row.prompt, _said(row.candidates[0])])}, row.candidates[0])
    if not row.candidates:
        return _about(row, {"prompt": _messages(row.prompt)})
    entries = [
        {"content": c.content}
        | ({"stance": c.stance} if c.stance else {})
        | ({"ratings": c.ratings} if c.ratings else {})
        | ({"markers": list(c.markers)} if c.markers else {})
        | c.extra
        for c in row.candidates
    ]
    return _about(row, {"prompt": _messages(row.prompt), "candidates": entries})


def _about(row: Conversation, made: Row, answer: Candidate | None = None) -> Row:
    """The row's id, then what was made of it, then the rest; an answer's own ratings, markers and keys beside them."""
    rest: Row = {"domain": row.domain, "language": row.language, "split": row.split}
    rest |= {"kind": "scaffolding"} if row.kind == "scaffolding" else {}
    markers = [*row.markers, *(answer.markers if answer else ())]
    rest |= {"markers": markers} if markers else {}
    if answer is not None:
        rest |= ({"stance": answer.stance} if answer.stance else {}) | answer.extra
        rest |= {"ratings": answer.ratings} if answer.ratings else {}
    return {"id": row.id, **made, **{k: v for k, v in rest.items() if v != ""}, **row.extra}


def _messages(turns: Sequence[Message]) -> list[Row]:
    return [{"role": m.role, "content": m.content} for m in turns]


def _said(answer: Candidate) -> Message:
    return Message("assistant", answer.content)


def _asked(row: Conversation) -> Sequence[Message]:
    if not row.prompt:
        raise BadInput(f"{row.where}: prompt: a text row has none; convert it to text or candidates (id {row.id!r})")
    return row.prompt


def _one(make: Callable[[Conversation, Candidate], Row]) -> Callable[[Conversation, str], Iterator[Row]]:
    def rows(row: Conversation, target: str) -> Iterator[Row]:
        answer = target_of(row, target)
        yield _about(row, make(row, answer), answer)

    return rows


def _columns(row: Conversation, target: str) -> Iterator[Row]:
    """A row per answer, for the instrument's sake: a column per dimension and no `ratings`."""
    target_of(row, target)  # a row without an answer is refused, not lost
    for number, answer in enumerate(row.candidates):
        made = {"prompt": _plain(row), "response": answer.content, **answer.ratings}
        about = _about(row, made, answer)
        about.pop("ratings", None)
        yield about if len(row.candidates) == 1 else {**about, "id": f"{row.id}/{answer.stance or number}"}


def _plain(row: Conversation) -> str | list[Row]:
    """A prompt of one user message as a string, any other as messages."""
    asked = _asked(row)
    return asked[0].content if len(asked) == 1 and asked[0].role == "user" else _messages(asked)


def _pairs(row: Conversation, target: str) -> Iterator[Row]:
    chosen = target_of(row, target)
    others = [c for c in row.candidates if c is not chosen]
    if not others:
        raise BadInput(
            f"{row.where}: one answer makes no pair; give candidates, or convert to messages (id {row.id!r})"
        )
    for other in others:
        about = _about(row, {"prompt": _plain(row), "chosen": chosen.content, "rejected": other.content})
        yield about if len(others) == 1 else {**about, "id": f"{row.id}/{other.stance or row.candidates.index(other)}"}


FORMATS: dict[str, Callable[[Conversation, str], Iterator[Row]]] = {
    "candidates": lambda row, target: iter([own(row)]),
    "messages": _one(lambda row, a: {"messages": _messages([*_asked(row), _said(a)])}),
    "sharegpt": _one(
        lambda row, a: {
            "conversations": [{"from": SHAREGPT[m.role], "value": m.content} for m in (*_asked(row), _said(a))]
        }
    ),
    "completion": _one(lambda row, a: {"prompt": _plain(row), "completion": a.content}),
    "columns": _columns,
    "pair": _pairs,
    "text": _one(lambda row, a: {"text": a.content}),
}

__all__ = ["FORMATS", "convert", "own", "write"]
