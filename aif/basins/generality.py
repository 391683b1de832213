"""Generality: does the preference for the target orientation carry over to prompts and domains never trained on?

    log-odds(x) = mean ln p per token of the target answer - mean over contrast answers of the same

and the effect of a solution is its log-odds minus the base model's, in nats per token, over held-out prompts of the
training domains and over whole held-out domains.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from aif.basins import Bench, Measured, Subject, ratio
from aif.basins.norms import twins
from aif.basins.scoring import carrying, losses
from aif.batches import Dataset

SPLITS = ("training domains", "held-out domains")
QUANTITIES = tuple(f"log-odds gained in {split}" for split in SPLITS)


class Options(BaseModel, extra="forbid"):
    prompts: int | None = Field(None, ge=1, description="held-out prompts per split; all when left out")
    controls: int = Field(1, ge=0, description="random twins per kind of solution, each with the norm of the last one")


def log_odds(sums: np.ndarray, tokens: np.ndarray, data: Dataset) -> np.ndarray:
    """Target-minus-contrast log-odds per prompt, nats per token, from - ln p sums and token counts per response."""
    per_token = -sums / tokens
    prompt = np.array([row for row, _ in data.owners])
    liked = data.tables["preference"] > 0
    numbers = np.unique(prompt)
    return np.array(
        [per_token[(prompt == p) & liked].mean() - per_token[(prompt == p) & ~liked].mean() for p in numbers]
    )


def unclear(effect: np.ndarray) -> str:
    """Why a share of this effect (one number per row) means nothing; empty when it does."""
    error = effect.std() / np.sqrt(len(effect))
    if len(effect) < 2 or abs(effect.mean()) > 2 * error:
        return ""
    return f"within two standard errors of zero ({effect.mean():.2g} with an error of {error:.2g})"


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The effect on held-out prompts in training domains and in held-out domains, per subject."""
    out: list[Measured] = []
    subjects = [s for s in bench.subjects if not s.control] + twins(bench, options.controls)
    for split, data in zip(SPLITS, (bench.alternatives, bench.alternatives_elsewhere), strict=True):
        data = data.some(options.prompts)
        before = log_odds(*losses(bench.base, data, rows=bench.rows), data)
        for subject in subjects:
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
