"""One grid of effective norms for all solutions of a kind, and the random twins that are compared on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from aif.adapter import effective_norm, random_like, to_norm
from aif.basins import Bench, Subject
from aif.types import Adapter


class Grid(NamedTuple):
    """Subjects of one kind with their twins; `norms` are factors of the mean own norm, `common` is where it stands."""

    subjects: list[Subject]
    norms: np.ndarray
    common: int

    def adapters(self, subject: Subject) -> list[Adapter]:
        """The subject rescaled to every norm."""
        return [to_norm(subject.adapter, n) for n in self.norms]


def grids(bench: Bench, factors: Sequence[float], controls: int) -> Iterator[Grid]:
    """A grid per kind of solution; the factor 1, the common norm, is always in it."""
    every = sorted({*factors, 1.0})
    for kind in dict.fromkeys(s.kind for s in bench.subjects):
        subjects = [s for s in bench.subjects if s.kind == kind and not s.control]
        mean = float(np.mean([float(effective_norm(s.adapter)) for s in subjects]))
        twins = [
            Subject(f"random {kind}", random_like(subjects[-1].adapter, jax.random.fold_in(bench.key, k)), k, True)
            for k in range(controls)
        ]
        yield Grid(subjects + twins, mean * np.array(every), every.index(1.0))
