"""What a corpus is made of: messages, candidates with ratings, conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Candidate:
    """One answer to a prompt.

    `stance` names the orientation it speaks from ("" when none is given; "chosen" and "rejected" in preference pairs).
    `ratings` maps dimension ids to levels counted from 0; a dimension that is absent is unrated and masked.
    `markers` are words for its qualities, which tiers can weigh.
    """

    content: str
    stance: str = ""
    ratings: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    markers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A prompt with its candidate answers.

    Attributes:
      prompt: the messages before the answer; empty for `text` rows.
      split: "train", "heldout", "heldout_domain", any other name that a config asks for, or "" when none is given.
      kind: "chat" (one answer), "preference" (several), "prompt" (none: the model is to answer), "text" (no roles), or
        "scaffolding" (a frame, never a target).
      where: "file:line" of the row.
      train_turns: whether the assistant's turns inside the prompt are trained too.
      extra: the row's other keys, untouched.
      markers: words for the qualities of the whole row.
    """

    id: str
    prompt: tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    domain: str
    language: str
    split: str
    kind: str
    where: str
    train_turns: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    markers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """The rows of a file, the messages of the bad rows that were skipped, and the file's hash."""

    rows: tuple[Conversation, ...]
    skipped: tuple[str, ...]
    path: Path
    sha256: str


__all__ = ["Candidate", "Conversation", "Corpus", "Message"]
