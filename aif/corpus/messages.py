"""Messages: their roles and contents, checked."""

from __future__ import annotations

from typing import Any

from aif.corpus.conversation import Message
from aif.corpus.jsonl import kind_of, nearest
from aif.errors import BadInput

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"} | {r: r for r in ROLES}


def messages(value: Any, key: str) -> tuple[Message, ...]:
    """Checked messages from a list of `{role, content}` or `{from, value}`; other keys of a message are not read."""
    if not isinstance(value, list) or not value:
        raise BadInput(f"{key}: must be a list of at least one message; write [{{'role': 'user', 'content': '...'}}]")
    return tuple(_message(entry, f"{key}[{k}]") for k, entry in enumerate(value))


def _message(entry: Any, key: str) -> Message:
    if not isinstance(entry, dict):
        raise BadInput(f"{key}: it is {kind_of(entry)}; write an object with role and content")
    sharegpt = "from" in entry and "role" not in entry
    names, words = (SHAREGPT, "from") if sharegpt else ({r: r for r in ROLES}, "role")
    role = entry.get(words)
    if role is None:
        raise BadInput(f"{key}.role: is missing; give one of {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in names:
        close = nearest(role, names) if isinstance(role, str) else ""
        raise BadInput(f"{key}.{words}: unknown role {_quote(role)}{close}; use {', '.join(names)}")
    for name in ("tool_calls", "function_call"):
        if entry.get(name):
            raise BadInput(f"{key}.{name}: calls are not read; write the call into content as text")
    for name in ("weight", "train", "training"):
        if entry.get(name) in (0, False):
            raise BadInput(f"{key}.{name}: turns cannot be left untrained one by one; use prompt and completion")
    content = text_of(entry, key, "value" if sharegpt else "content", answer=names[role] == "assistant")
    return Message(names[role], content)


def text_of(entry: dict[str, Any], key: str, name: str, answer: bool) -> str:
    """The text under `name`, never blank in an answer; `key` is the place of `entry` in the row."""
    path = f"{key}.{name}" if key else name
    value = entry.get(name)
    if value is None:
        raise BadInput(f"{path}: is missing or null; give text")
    if not isinstance(value, str):
        raise BadInput(f"{path}: it is {kind_of(value)}; give text")
    if answer and not value.strip():
        raise BadInput(f"{path}: the answer is empty; write it or drop the row")
    return value


def optional_text(row: dict[str, Any], key: str, path: str = "") -> str:
    """The text under `key`, "" when it is absent."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise BadInput(f"{path or key}: it is {kind_of(value)}; give text or leave it out")
    return value


def optional_words(row: dict[str, Any], key: str, path: str = "") -> tuple[str, ...]:
    """The list of words under `key`, empty when it is absent."""
    value = row.get(key, [])
    if not isinstance(value, list) or not all(isinstance(word, str) and word.strip() for word in value):
        raise BadInput(f'{path or key}: must be a list of words; write ["concrete", "playful"] or leave it out')
    return tuple(value)


def _quote(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


__all__ = ["messages", "optional_text", "optional_words", "text_of"]
