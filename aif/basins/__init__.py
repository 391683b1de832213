"""Basin metrics: one file each. A metric turns solutions into `Measured` quantities with per-row contributions.

A file of this folder that defines `Options` and `measure(bench, options)` is a metric that configs can name. It lists
its scalars in `QUANTITIES`, so that a question about one can be checked before anything is trained; `{arm}` stands
for the name of each arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jax import Array

from aif.batches import Dataset
from aif.corpus import Conversation
from aif.policy import Policy
from aif.types import Adapter


@dataclass(frozen=True)
class Subject:
    """A solution under measurement: what it adds to the base model. `control` marks random twins."""

    name: str
    adapter: Adapter
    seed: int = 0
    control: bool = False

    @property
    def kind(self) -> str:
        """Solutions of one kind share a norm grid: effective norms of weights and of vectors do not compare."""
        parts = list(self.adapter.values())
        return "full" if any("d" in p for p in parts) else "vector" if any("u" in p for p in parts) else "lora"


@dataclass(frozen=True)
class Measured:
    """One quantity of one subject, as a function of row weights, so that intervals can be paired across subjects.

    `value(w)` takes a weight per row (`[rows]`, all ones for the plain value; integers for a bootstrap resample) and
    returns one number, or one per point of `x`. It is a `functools.partial` of a function of the metric's file that
    binds arrays by name: function and arrays are what is kept on disk, so that a finished metric is read back.
    """

    metric: str
    quantity: str
    unit: str
    better: str  # "lower", "higher" or ""
    subject: str
    seed: int
    control: bool
    rows: int
    row_name: str
    value: Callable[[np.ndarray], Any]
    x: tuple[float, ...] = ()
    x_label: str = ""


Further = Callable[[Subject, str, int], Adapter]


@dataclass(frozen=True)
class Bench:
    """What metrics measure on: the base model, the subjects and the held-out data.

    `target` holds the target responses of held-out prompts of training domains; `alternatives` and
    `alternatives_elsewhere` hold all candidates of held-out prompts, in training domains and in held-out domains.
    `further(subject, arm, steps)` is the solution after so many more steps of that arm's own stage. `paths` holds, per
    arm and seed, the solution after some of its steps (0 is where it started).
    """

    base: Policy
    subjects: Sequence[Subject]
    target: Dataset
    alternatives: Dataset
    alternatives_elsewhere: Dataset
    tokenizer: Any
    rows: int
    key: Array
    arms: Sequence[str] = ()
    stance: str = ""  # whose answers are the target
    training: Dataset | None = None  # target responses of training prompts
    shown: Sequence[Conversation] = ()  # rows of training prompts
    asked: Sequence[Conversation] = ()  # rows of held-out prompts
    further: Further | None = None
    paths: Mapping[tuple[str, int], Mapping[int, Adapter]] = field(default_factory=dict)
    say: Callable[[str], None] = field(default=lambda text: None)
    note: Callable[[str], None] = field(default=lambda text: None)  # what the reader of the report must know


def ratio(sums: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """w -> (w . sums) / (w . weights): a token-weighted mean over rows, `sums` `[rows]` or `[rows, points]`."""
    return partial(weighted_mean, sums=sums, weights=weights)


def weighted_mean(w: np.ndarray, *, sums: np.ndarray, weights: np.ndarray) -> Any:
    """(w . sums) / (w . weights)."""
    return (w @ sums) / (w @ weights)
