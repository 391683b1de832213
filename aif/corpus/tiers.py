"""Composite score of a row, tiers by score, and the weight in training that a tier gives.

    score = sum_k w_k x_k / sum_k w_k   over the parts x_k in [0, 1] that the row has

    rating    mean of level / (levels - 1) over the rated dimensions of the answer
    depth     1/2 turns / (turns + half_turns) + 1/2 words / (words + half_words), of the conversation and its answer
    markers   sum of the weights of the row's markers, over the sum of the positive ones, cut to [0, 1]

A part is left out where nothing is known: the rating of an unrated answer, markers when the rule weighs none. A row's
score is that of its target answer. Its tier is high, mid or broad; the tier's weight multiplies the row in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from aif.corpus.conversation import Candidate, Conversation
from aif.corpus.jsonl import told
from aif.corpus.nexus import Scale
from aif.errors import BadInput

TIERS = {"high": 2.0, "mid": 1.0, "broad": 0.5}  # and what a row of each counts in the loss


@dataclass(frozen=True)
class Tiers:
    """The rule that scores rows and sorts them into tiers.

    Attributes:
      rating, depth, marked: weights of the three parts. markers: weight of each qualitative marker; below 0 counts
        against.
      half_turns, half_words: where the two halves of the depth reach 1/2.
      by: "quantile": the borders are quantiles of the scores; "threshold": they are scores.
      high, mid: borders; a row whose score reaches one is in that tier, any other is broad.
      weights: what a row of a tier counts in the loss, where it is not as in `TIERS`.
    """

    rating: float = 0.6
    depth: float = 0.2
    marked: float = 0.2
    markers: dict[str, float] = field(default_factory=dict)
    half_turns: float = 4.0
    half_words: float = 100.0
    by: Literal["quantile", "threshold"] = "quantile"
    high: float = 0.75
    mid: float = 0.25
    weights: dict[str, float] = field(default_factory=dict)

    def weight(self, tier: str) -> float:
        """What a row of the tier counts in the loss."""
        return self.weights.get(tier, TIERS[tier])


class Score(NamedTuple):
    """The score of an answer and its parts; None where a part is not known."""

    score: float
    rating: float | None
    depth: float
    markers: float | None


def score(row: Conversation, answer: Candidate, scale: Scale, rule: Tiers) -> Score:
    """The composite score of one answer of a row; in [0, 1]."""
    levels = [answer.ratings[d.id] for d in scale.dimensions if d.id in answer.ratings]
    rating = float(np.mean(levels)) / (len(scale.levels) - 1) if levels else None
    depth = _depth(row, answer, rule)
    markers = _markers({*row.markers, *answer.markers}, rule.markers)
    parts = [(rule.rating, rating), (rule.depth, depth), (rule.marked, markers)]
    known = [(w, x) for w, x in parts if x is not None]
    total = sum(w for w, _ in known)
    return Score(sum(w * x for w, x in known) / total if total else 0.0, rating, depth, markers)


def _depth(row: Conversation, answer: Candidate, rule: Tiers) -> float:
    turns, words = len(row.prompt) + 1, len(answer.content.split())
    return 0.5 * turns / (turns + rule.half_turns) + 0.5 * words / (words + rule.half_words)


def _markers(found: set[str], weights: dict[str, float]) -> float | None:
    most = sum(w for w in weights.values() if w > 0)
    return float(np.clip(sum(weights.get(m, 0.0) for m in found) / most, 0, 1)) if most else None


def target_of(row: Conversation, target: str) -> Candidate:
    """The answer that is trained: the first of the target stance, or chosen, else the first.

    Raises:
      BadInput: the row has no answer.
    """
    if not row.candidates:
        raise BadInput(
            f"{row.where}: prompt: has no answer; add completion, candidates, or chosen and rejected{told(row.id)}"
        )
    return next((c for c in row.candidates if c.stance in (target, "chosen")), row.candidates[0])


def scores(rows: Sequence[Conversation], scale: Scale, rule: Tiers, target: str) -> list[Score]:
    """The score of every row's target answer."""
    return [score(row, target_of(row, target), scale, rule) for row in rows]


def tiers(values: Sequence[float], rule: Tiers) -> list[str]:
    """The tier of every score; by quantile, equal scores share the higher tier."""
    found = np.asarray(values, float)
    borders = np.quantile(found, [rule.high, rule.mid]) if rule.by == "quantile" else (rule.high, rule.mid)
    return ["high" if v >= borders[0] else "mid" if v >= borders[1] else "broad" for v in found]


def sampling_weights(rows: Sequence[Conversation], scale: Scale, rule: Tiers, target: str) -> list[float]:
    """What every row counts in the loss: the weight of its tier."""
    found = tiers([s.score for s in scores(rows, scale, rule, target)], rule)
    return [rule.weight(tier) for tier in found]


def summary(rows: Sequence[Conversation], scale: Scale, rule: Tiers, target: str) -> dict[str, Any]:
    """Every row's score with its parts and tier, and what the tiers hold, ready for JSON."""
    found = scores(rows, scale, rule, target)
    named = tiers([s.score for s in found], rule)
    listed = [
        {"id": row.id, "tier": tier, "weight": rule.weight(tier)} | {k: _short(v) for k, v in s._asdict().items()}
        for row, s, tier in zip(rows, found, named, strict=True)
    ]
    held = {t: [round(s.score, 4) for s, tier in zip(found, named, strict=True) if tier == t] for t in TIERS}
    return {
        "tiers": {
            t: {"rows": len(v), "least": min(v, default=None), "most": max(v, default=None), "weight": rule.weight(t)}
            for t, v in held.items()
        },
        "rows": listed,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


__all__ = ["TIERS", "Score", "Tiers", "sampling_weights", "score", "scores", "summary", "target_of", "tiers"]
