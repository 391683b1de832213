"""Ratings: reading them from a row, the profile they form, and agreement between raters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aif.corpus.jsonl import kind_of, nearest, show
from aif.corpus.nexus import Scale
from aif.errors import BadInput


@dataclass(frozen=True)
class Profile:
    """How a set of rated answers looks, dimension by dimension; unrated entries are masked.

    Attributes:
      dimensions: ids, in the scale's order.
      count: answers rated on each dimension.
      mean: mean level; NaN where no answer is rated.
      covariance: over the answers rated on both dimensions, divided by n - 1; NaN where there are fewer than two.
      pinned_low: dimensions on which at least nine in ten rated answers hold the lowest level.
    """

    dimensions: tuple[str, ...]
    count: dict[str, int]
    mean: dict[str, float]
    covariance: np.ndarray
    pinned_low: tuple[str, ...]


def read_ratings(
    entry: dict[str, Any], scale: Scale | None, prefix: str = ""
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Ratings of a row or candidate and the keys they came from: a nested `ratings` dict, flat `<scale>_<dim>` keys, or
    keys that are a dimension's id.

    A level is a whole number from 0, or a level's name. null and absent dimensions are unrated. A flat key that looks
    like no dimension is none.

    Raises:
      BadInput: an unknown dimension, a dimension rated twice, or a level outside the scale.
    """
    nested = entry.get("ratings", {})
    if not isinstance(nested, dict):
        raise BadInput(f"{prefix}ratings: it is {kind_of(nested)}; write an object, dimension: level")
    found = [(f"{prefix}ratings.{show(name)}", name, value) for name, value in nested.items()]
    flat = _flat(entry, scale)
    found += [(f"{prefix}{show(key)}", name, entry[key]) for key, name in flat.items()]
    known = [d.id for d in scale.dimensions] if scale else []
    ratings: dict[str, int] = {}
    for key, name, value in found:
        if value is None:
            continue
        if scale and name not in known:
            raise BadInput(f"{key}: no dimension of scale {scale.name!r}{nearest(name, known)}; rename or drop it")
        if name in ratings:
            raise BadInput(f"{key}: the dimension is rated twice; keep one")
        ratings[name] = _level(value, key, scale)
    return ratings, (*(["ratings"] if "ratings" in entry else []), *flat)


def _flat(entry: dict[str, Any], scale: Scale | None) -> dict[str, str]:
    """Flat keys that name a dimension, or with the scale's name before them nearly do."""
    if scale is None:
        return {}
    known = [d.id for d in scale.dimensions]
    start = f"{scale.name}_"
    names = {key: key[len(start) :] for key in entry if key.startswith(start)}
    bare = {key: key for key in entry if key in known}
    return bare | {key: name for key, name in names.items() if name in known or nearest(name, known)}


def _level(value: Any, key: str, scale: Scale | None) -> int:
    if scale and isinstance(value, str) and value in scale.levels:
        return scale.levels.index(value)
    top = len(scale.levels) - 1 if scale else None
    allowed = f"0..{top} or {', '.join(scale.levels)}" if scale else "a whole number from 0"
    if isinstance(value, bool) or not isinstance(value, int):
        given = repr(value[:40]) if isinstance(value, str) else f"{kind_of(value)}"
        given = f"the number {value}" if isinstance(value, float) else given
        raise BadInput(f"{key}: {given} is no level; use {allowed}")
    if value < 0 or (top is not None and value > top):
        raise BadInput(f"{key}: {str(value)[:40]} is outside the scale; use {allowed}")
    return value


def profile(ratings: Sequence[Mapping[str, float]], scale: Scale | None = None, pinned: float = 0.9) -> Profile:
    """The profile of answers' ratings.

    Args:
      ratings: one dict per answer, dimension id to level (or expected level); absent dimensions are masked.
      scale: gives the dimensions and their order; without it, every rated dimension in alphabetical order.
      pinned: share of lowest-level answers from which a dimension counts as pinned low.
    """
    names = [d.id for d in scale.dimensions] if scale else sorted({d for r in ratings for d in r})
    table = np.array([[r.get(d, np.nan) for d in names] for r in ratings], float).reshape(len(ratings), len(names))
    count = (~np.isnan(table)).sum(axis=0)
    mean = np.nansum(table, axis=0) / np.where(count == 0, np.nan, count)
    low = (table < 0.5).sum(axis=0)
    return Profile(
        dimensions=tuple(names),
        count={d: int(n) for d, n in zip(names, count, strict=True)},
        mean={d: float(m) for d, m in zip(names, mean, strict=True)},
        covariance=_covariance(table),
        pinned_low=tuple(d for d, n, k in zip(names, count, low, strict=True) if n and k >= pinned * n),
    )


def distance(first: Profile, second: Profile, levels: int) -> float:
    """How far apart two profiles lie, as a share of the scale:

        d = sqrt( mean over dimensions of ((m - m') / (levels - 1))^2 )

    over the dimensions that both have rated; 0 for equal means, 1 for opposite ends throughout, NaN where they share
    none.
    """
    shared = [d for d in first.dimensions if first.count[d] and second.count.get(d)]
    gaps = [(first.mean[d] - second.mean[d]) / (levels - 1) for d in shared]
    return float(np.sqrt(np.mean(np.square(gaps)))) if gaps else float("nan")


def quadratic_kappa(a: Sequence[int], b: Sequence[int], levels: int) -> float:
    """Agreement of two raters beyond chance, with disagreements weighed by their squared distance:

        kappa = 1 - sum_ij (i - j)^2 O_ij / sum_ij (i - j)^2 E_ij,   E_ij = O_i. O_.j / n

    1 is full agreement, 0 is chance, NaN where both give one and the same level throughout. Pairs with a negative
    entry (unrated) are left out.

    Raises:
      ValueError: the raters rated different numbers of answers, or a rating is `levels` or more.
    """
    first, second = np.asarray(a, int), np.asarray(b, int)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"two flat lists of one length are compared, not {first.shape} and {second.shape}")
    if max(first.max(initial=-1), second.max(initial=-1)) >= levels:
        raise ValueError(f"a rating lies outside 0..{levels - 1}")
    both = (first >= 0) & (second >= 0)
    observed = np.zeros((levels, levels))
    np.add.at(observed, (first[both], second[both]), 1)
    weight = np.subtract.outer(np.arange(levels), np.arange(levels)) ** 2
    chance = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / max(both.sum(), 1)
    expected = (weight * chance).sum()
    return float(1 - (weight * observed).sum() / expected) if expected else float("nan")


def _covariance(table: np.ndarray) -> np.ndarray:
    """Pairwise-complete covariance of the columns."""
    size = table.shape[1]
    out = np.full((size, size), np.nan)
    for i in range(size):
        for j in range(size):
            both = ~np.isnan(table[:, i]) & ~np.isnan(table[:, j])
            if both.sum() > 1:
                x, y = table[both, i], table[both, j]
                out[i, j] = ((x - x.mean()) * (y - y.mean())).sum() / (both.sum() - 1)
    return out


__all__ = ["Profile", "distance", "profile", "quadratic_kappa", "read_ratings"]
