"""Rated transcripts as profiles turn by turn, and two systems side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aif.corpus import Conversation, Profile, Scale, profile
from aif.corpus.ratings import distance
from aif.errors import BadInput


def profiles(rows: Sequence[Conversation], scale: Scale) -> dict[str, Profile]:
    """The profile of a rated transcript turn by turn ("turn 1", ...) and over all of its turns ("all").

    Expected levels are used where a reader left them, else the ratings.

    Raises:
      BadInput: a row is no turn of a transcript, or nothing is rated.
    """
    turns: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        number, answer = row.extra.get("turn"), row.candidates[0]
        if not isinstance(number, int) or isinstance(number, bool):
            raise BadInput(f"{row.where}: turn: is missing or no number; give a file that `aif protocol run` wrote")
        expected = answer.extra.get("expected")
        found = expected if isinstance(expected, dict) and set(expected) == set(answer.ratings) else answer.ratings
        turns.setdefault(f"turn {number}", []).append({k: float(v) for k, v in found.items()})
    if not any(ratings for found in turns.values() for ratings in found):
        raise BadInput(f"{rows[0].where.rpartition(':')[0]}: no answer is rated; rate it with `aif protocol rate`")
    ordered = sorted(turns, key=lambda name: int(name.split()[1]))
    together = [ratings for found in turns.values() for ratings in found]
    return {name: profile(turns[name], scale) for name in ordered} | {"all": profile(together, scale)}


def compared(first: Sequence[Conversation], second: Sequence[Conversation], scale: Scale) -> dict[str, Any]:
    """Two transcripts of one protocol side by side: profiles per turn, distance, and the answers; ready for JSON.

    Raises:
      BadInput: they share no turn, or one is not rated.
    """
    names = [_system(rows) for rows in (first, second)]
    names = names if names[0] != names[1] else [f"{names[0]} (1)", f"{names[1]} (2)"]
    found = [profiles(rows, scale) for rows in (first, second)]
    shared = [turn for turn in found[0] if turn in found[1]]
    ours, theirs = ({(row.extra.get("scenario"), row.extra["turn"]): row for row in rows} for rows in (first, second))
    both = [key for key in ours if key in theirs]
    if not both:
        raise BadInput(f"{second[0].where}: no scenario and turn in common; run both systems through one protocol")
    return {
        "systems": names,
        "levels": list(scale.levels),
        "dimensions": {d.id: d.name for d in scale.dimensions},
        "turns": {
            turn: {
                "profiles": [_told(side[turn]) for side in found],
                "distance": _number(distance(found[0][turn], found[1][turn], len(scale.levels))),
            }
            for turn in shared
        },
        "answers": [
            {
                "scenario": key[0],
                "turn": key[1],
                "asked": ours[key].prompt[-1].content,
                "said": [side[key].candidates[0].content for side in (ours, theirs)],
            }
            for key in both
        ],
    }


def _system(rows: Sequence[Conversation]) -> str:
    return rows[0].candidates[0].stance or rows[0].where


def _told(found: Profile) -> dict[str, Any]:
    return {
        "answers": max(found.count.values(), default=0),
        "mean": {d: _number(m) for d, m in found.mean.items()},
        "pinned_low": list(found.pinned_low),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


__all__ = ["compared", "profiles"]
