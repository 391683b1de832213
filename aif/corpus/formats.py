"""From a row's keys to a conversation. The format is told by the keys; every spelling ends as prompt and candidates.

- prompt + candidates: several rated answers of different stance
- prompt + chosen + rejected: a preference pair; without `prompt`, the messages that both sides start with
- prompt + completion (or response, as in HelpSteer): one answer
- messages: a whole conversation, every assistant turn of which is trained
- conversations: the same in ShareGPT's words, `from` and `value`
- text: plain text without roles
- prompt alone, or messages without an assistant turn: something to be answered by the model; no training target
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from aif.corpus.conversation import Candidate, Conversation, Message
from aif.corpus.jsonl import kind_of, nearest, show
from aif.corpus.messages import messages, optional_text, optional_words, text_of
from aif.corpus.nexus import Scale
from aif.corpus.ratings import read_ratings
from aif.errors import BadInput

COMMON = ("id", "domain", "language", "split", "kind", "markers", "ratings")
ROW_FORMATS = (
    "prompt+candidates",
    "prompt+chosen+rejected",
    "prompt+completion",
    "prompt+response",
    "messages",
    "conversations",
    "text",
)
ANSWERS = ("prompt", "candidates", "chosen", "rejected", "completion", "response", "messages", "conversations", "text")
NAMES = (*COMMON, *ANSWERS)


class Parts(NamedTuple):
    """What a format's reader takes from a row: the keys it used are in `used`."""

    prompt: tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    kind: str
    used: tuple[str, ...]
    train_turns: bool = False


def conversation(row: dict[str, Any], where: str, scale: Scale | None) -> Conversation:
    """The conversation that a row stands for. Keys that no format knows are kept in `extra`; null is as good as absent.

    `kind: scaffolding` marks a frame; any other `kind` is kept in `extra`, for the format decides it.

    Raises:
      BadInput: "key: what is wrong; how to fix it".
    """
    row = {key: value for key, value in row.items() if value is not None}
    words = {key: optional_text(row, key) for key in ("domain", "language", "split", "kind")}
    parts = _reader(row)(row, scale)
    scaffolding = words["kind"] == "scaffolding"
    used = {*parts.used, "id", "domain", "language", "split", "markers", *(["kind"] if scaffolding else [])}
    return Conversation(
        id=identity(row, where),
        prompt=parts.prompt,
        candidates=parts.candidates,
        domain=words["domain"],
        language=words["language"],
        split=words["split"],
        kind="scaffolding" if scaffolding else parts.kind,
        where=where,
        train_turns=parts.train_turns,
        extra={key: value for key, value in row.items() if key not in used},
        markers=optional_words(row, "markers"),
    )


def identity(row: dict[str, Any], where: str) -> str:
    """The row's `id` (text or a whole number), or its place in the file when it has none."""
    value = row.get("id")
    if value is None:
        return where
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadInput(f"id: must be text or a whole number, not {kind_of(value)}; write it in quotes")
    return str(value)


def _reader(row: dict[str, Any]) -> Callable[[dict[str, Any], Scale | None], Parts]:
    if "candidates" in row:
        return _candidates
    if "chosen" in row or "rejected" in row:
        return _pair
    if "completion" in row:
        return _completion
    if "response" in row and "prompt" in row:
        return partial(_completion, key="response")
    if "messages" in row or "conversations" in row:
        return _messages
    if "text" in row:
        return _text
    if "prompt" in row:
        return lambda row, scale: Parts(_prompt(row), (), "prompt", ("prompt",))
    keys = ", ".join(show(key) for key in list(row)[:8]) or "none"
    close = next((c for c in (nearest(key, ANSWERS) for key in row) if c), "")
    raise BadInput(f"row: its keys ({keys}) fit no format{close}; give {', '.join(ROW_FORMATS)}, or rename columns")


def _candidates(row: dict[str, Any], scale: Scale | None) -> Parts:
    entries = row["candidates"]
    if not isinstance(entries, list) or not entries:
        raise BadInput("candidates: must be a list of at least one answer; give objects with content")
    found = tuple(_candidate(entry, f"candidates[{k}]", scale) for k, entry in enumerate(entries))
    _distinct([(f"candidates[{k}]", c.content) for k, c in enumerate(found)])
    return Parts(_prompt(row), found, "preference" if len(found) > 1 else "chat", ("prompt", "candidates"))


def _candidate(entry: Any, key: str, scale: Scale | None) -> Candidate:
    if not isinstance(entry, dict):
        raise BadInput(f"{key}: it is {kind_of(entry)}; write an object with content")
    entry = {name: value for name, value in entry.items() if value is not None}
    content = text_of(entry, key, "content", answer=True)
    stance = optional_text(entry, "stance", f"{key}.stance")
    ratings, used = read_ratings(entry, scale, f"{key}.")
    markers = optional_words(entry, "markers", f"{key}.markers")
    known = {"content", "stance", "markers", *used}
    return Candidate(content, stance, ratings, {name: v for name, v in entry.items() if name not in known}, markers)


def _pair(row: dict[str, Any], scale: Scale | None) -> Parts:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadInput(f"{name}: is missing; a preference pair has chosen and rejected")
    prompt, chosen, rejected = _sides(row)
    _distinct([("chosen", chosen), ("rejected", rejected)])
    found = (Candidate(chosen, "chosen"), Candidate(rejected, "rejected"))
    return Parts(prompt, found, "preference", ("prompt", "chosen", "rejected"))


def _sides(row: dict[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    """Prompt and the two answers. A side given as messages may repeat the prompt that it answers."""
    sides = [row["chosen"], row["rejected"]]
    if "prompt" in row:
        prompt = _prompt(row)
    elif all(isinstance(side, list) for side in sides):
        chosen, rejected = (messages(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = _answerable(chosen[:shared], "chosen")
    else:
        raise BadInput("prompt: is missing; give it, or give chosen and rejected as lists of messages that share it")
    return prompt, _answer(row, "chosen", prompt), _answer(row, "rejected", prompt)


def _completion(row: dict[str, Any], scale: Scale | None, key: str = "completion") -> Parts:
    prompt = _prompt(row)
    content = _answer(row, key, prompt)
    ratings, used = read_ratings(row, scale)
    return Parts(prompt, (Candidate(content, "", ratings),), "chat", ("prompt", key, *used))


def _messages(row: dict[str, Any], scale: Scale | None) -> Parts:
    """A conversation up to its last assistant turn, which is the candidate; what follows predicts nothing."""
    key = "messages" if "messages" in row else "conversations"
    turns = messages(row[key], key)
    last = max((k for k, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        return Parts(turns, (), "prompt", (key,))
    if last == 0:
        raise BadInput(f"{key}[0]: the answer comes first; put the user's message before it")
    ratings, used = read_ratings(row, scale)
    answer = Candidate(turns[last].content, "", ratings)
    return Parts(turns[:last], (answer,), "chat", (key, *used), train_turns=True)


def _text(row: dict[str, Any], scale: Scale | None) -> Parts:
    ratings, used = read_ratings(row, scale)
    return Parts((), (Candidate(text_of(row, "", "text", answer=True), "", ratings),), "text", ("text", *used))


def _prompt(row: dict[str, Any]) -> tuple[Message, ...]:
    value = row.get("prompt")
    if value is None:
        raise BadInput("prompt: is missing; give the user's words or a list of messages")
    if isinstance(value, str):
        if not value.strip():
            raise BadInput("prompt: is empty; give the user's words, or use a text row")
        return (Message("user", value),)
    return _answerable(messages(value, "prompt"), "prompt")


def _answerable(prompt: tuple[Message, ...], key: str) -> tuple[Message, ...]:
    if not prompt:
        raise BadInput(f"{key}: no message to answer; start with the user's words")
    if prompt[-1].role == "assistant":
        raise BadInput(f"{key}[{len(prompt) - 1}]: ends with the assistant's turn; end with the message it answers")
    return prompt


def _answer(row: dict[str, Any], key: str, prompt: tuple[Message, ...]) -> str:
    """The words of an answer: a string, or a list of one assistant message, with or without the prompt before it."""
    if not isinstance(row[key], list):
        return text_of(row, "", key, answer=True)
    turns = messages(row[key], key)
    turns = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if len(turns) != 1 or turns[0].role != "assistant":
        raise BadInput(f"{key}: must hold one assistant message after the prompt; move earlier turns into prompt")
    return turns[0].content


def _distinct(answers: list[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for key, content in answers:
        if content in seen:
            raise BadInput(f"{key}: says the same as {seen[content]}; an answer cannot be preferred to itself")
        seen[content] = key


__all__ = ["NAMES", "conversation", "identity"]
