"""One grid of effective norms for all solutions of a kind, and the random twins that are compared on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from aif.adapter import effective_norm, random_like, to_norm
from aif.basins import Bench, Subject


class Grid(NamedTuple):
    """Subjects of one kind with their twins; `norms` are factors of the mean own norm, `common` is where it stands."""

    subjects: list[Subject]
    norms: np.ndarray
    common: int

    @property
    def points(self) -> Float[Array, "P"]:
        """The norms as `at_norm` takes them."""
        return jnp.asarray(self.norms, jnp.float32)


def at_norm(subject: Subject) -> Partial:
    """The family of a subject's rescalings: norm -> adapter."""
    return Partial(to_norm, subject.adapter)


def grids(bench: Bench, factors: Sequence[float], controls: int) -> Iterator[Grid]:
    """A grid per kind of solution; the factor 1, the common norm, is always in it. What has no norm has no grid."""
    every = sorted({*factors, 1.0})
    for kind in dict.fromkeys(s.kind for s in bench.subjects):
        subjects = [s for s in moved(bench) if s.kind == kind]
        if not subjects:
            continue
        mean = float(np.mean([float(effective_norm(s.adapter)) for s in subjects]))
        yield Grid(subjects + twins_of(subjects[-1], bench, controls), mean * np.array(every), every.index(1.0))


def twins_of(subject: Subject, bench: Bench, controls: int) -> list[Subject]:
    """Random subjects with the norm of this one in every module and layer."""
    keys = [jax.random.fold_in(bench.key, k) for k in range(controls)]
    return [Subject(f"random {subject.kind}", random_like(subject.adapter, key), k, True) for k, key in enumerate(keys)]


def twins(bench: Bench, controls: int) -> list[Subject]:
    """The twins of the last solution of every kind."""
    last = {s.kind: s for s in bench.subjects if not s.control and float(effective_norm(s.adapter)) > 0}
    return [twin for subject in last.values() for twin in twins_of(subject, bench, controls)]


def moved(bench: Bench) -> list[Subject]:
    """The solutions that differ from the base model; what does not, or is not finite, is left out with a note."""
    out = []
    for subject in (s for s in bench.subjects if not s.control):
        norm = float(effective_norm(subject.adapter))
        if 0 < norm < np.inf:
            out.append(subject)
        else:
            why = "it is the base model: its norm is zero" if norm == 0 else f"its norm is {norm}"
            bench.note(f"{subject.name} is left out where solutions are compared at one norm: {why}.")
    return out
