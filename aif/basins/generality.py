"""Generality: does the preference for the target orientation carry over to prompts and domains never trained on?

    log-odds(x) = mean ln p per token of the target answer - mean over contrast answers of the same

and the effect of a solution is its log-odds minus the base model's, in nats per token, over held-out prompts of the
training domains and over whole held-out domains.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from aif.basins import Bench, Measured, Subject, ratio
from aif.basins.scoring import carrying, losses
from aif.batches import Dataset

SPLITS = ("training domains", "held-out domains")
QUANTITIES = tuple(f"log-odds gained in {split}" for split in SPLITS)


class Options(BaseModel, extra="forbid"):
    prompts: int | None = Field(None, ge=1, description="held-out prompts per split; all when left out")


def log_odds(sums: np.ndarray, tokens: np.ndarray, data: Dataset) -> np.ndarray:
    """Target-minus-contrast log-odds per prompt, nats per token, from - ln p sums and token counts per response."""
    per_token = -sums / tokens
    prompt = np.array([row for row, _ in data.owners])
    liked = data.tables["preference"] > 0
    numbers = np.unique(prompt)
    return np.array(
        [per_token[(prompt == p) & liked].mean() - per_token[(prompt == p) & ~liked].mean() for p in numbers]
    )


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The effect on held-out prompts in training domains and in held-out domains, per subject."""
    out: list[Measured] = []
    for split, data in zip(SPLITS, (bench.alternatives, bench.alternatives_elsewhere), strict=True):
        data = data.some(options.prompts)
        before = log_odds(*losses(bench.base, data, rows=bench.rows), data)
        for subject in (s for s in bench.subjects if not s.control):
            bench.say(f"generality: {subject.name}, {split}")
            after = log_odds(*losses(carrying(bench.base, subject.adapter), data, rows=bench.rows), data)
            out.append(_quantity(subject, split, after - before))
    return out


def _quantity(subject: Subject, split: str, effect: np.ndarray) -> Measured:
    return Measured(
        metric="generality",
        quantity=f"log-odds gained in {split}",
        unit="nats/token",
        better="higher",
        subject=subject.name,
        seed=subject.seed,
        control=subject.control,
        rows=len(effect),
        row_name="held-out prompts",
        value=ratio(effect, np.ones(len(effect))),
    )
