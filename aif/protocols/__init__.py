"""Evaluation of whole systems: a model is led through a protocol's conversations, and a reader rates what it said.

A transcript is a corpus: a row per turn, with the conversation so far as its prompt and the system's answer as its one
candidate, whose stance is the system's name. It can be checked, shown, rated by people and compared like any other.
"""

from __future__ import annotations

from collections.abc import Callable

from aif.corpus import Candidate, Conversation, Message
from aif.corpus.protocol import Protocol, Scenario
from aif.protocols.systems import System

SILENCE = "(no answer)"  # stands for an answer without a word


def run(
    protocol: Protocol, system: System, name: str, say: Callable[[str], None] = lambda text: None
) -> list[Conversation]:
    """Lead the system through every scenario, one turn of all of them at a time; a row per turn, by scenario."""
    talks = {s.id: list(s.opening) for s in protocol.scenarios}
    rows: dict[str, list[Conversation]] = {s.id: [] for s in protocol.scenarios}
    for turn in range(max(len(s.turns) for s in protocol.scenarios)):
        going = [s for s in protocol.scenarios if turn < len(s.turns)]
        say(f"{name}: turn {turn + 1}, {len(going)} conversations")
        for s in going:
            talks[s.id].append(Message("user", s.turns[turn]))
        for s, said in zip(going, system([talks[s.id] for s in going]), strict=True):
            words = said if said.strip() else SILENCE
            about = {"protocol": protocol.name, "scenario": s.id, "turn": turn + 1}
            rows[s.id].append(_row(s, tuple(talks[s.id]), Candidate(words, name), about))
            talks[s.id].append(Message("assistant", words))
    return [row for found in rows.values() for row in found]


def _row(scenario: Scenario, talk: tuple[Message, ...], answer: Candidate, about: dict[str, str | int]) -> Conversation:
    name, place = f"{scenario.id}/{about['turn']}", f"{scenario.id}, turn {about['turn']}"
    about_it = (scenario.domain, scenario.language, "", "chat", place)
    return Conversation(name, talk, (answer,), *about_it, extra=about)


__all__ = ["SILENCE", "run"]
