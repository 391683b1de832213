"""Geometry: which way solutions lie from the base model, and how near one another.

    cos(x, y) = <x, y> / (||x|| ||y||)   of the weight changes, over all layers and layer by layer, without building A B
    overlap   = mean of the squared cosines of the principal angles between what B and B' write to

Rows are the changed matrices (one per part and layer), so an interval says how even the agreement is over the model.
Unrelated directions of D dimensions have |cos| of about 1 / sqrt(D), and unrelated r-dimensional spaces an overlap of
r / D: the random twin shows both. Solutions that share a first stage share its change.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field

from aif.adapter import inner
from aif.basins import Bench, Measured, Subject, weighted_mean
from aif.basins.norms import moved, twins_of
from aif.types import Adapter

QUANTITIES = ("cosine with {arm}", "overlap with {arm}")  # of every solution with those before it


class Options(BaseModel, extra="forbid"):
    controls: int = Field(1, ge=0, description="random twins per kind of solution")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """For every pair of solutions of a kind and seed: cosine, cosine per layer, and overlap of low-rank spaces."""
    bench.say("geometry")
    out: list[Measured] = []
    for first, second in pairs(bench, options.controls):
        products = alignment(first.adapter, second.adapter)
        what = about(second, "weight matrices", products["both"].size, metric="geometry")
        flat = {name: x.ravel() for name, x in products.items()}
        name = f"cosine with {first.name}"
        out.append(Measured(quantity=name, unit="cosine", better="", value=partial(cosine, **flat), **what))
        layers = {"x": tuple(map(float, range(products["both"].shape[1]))), "x_label": "layer"}
        by_layer = {**what, "rows": len(products["both"])}
        if len(layers["x"]) > 1:
            value = partial(cosine, **products)
            out.append(
                Measured(quantity=f"{name}, by layer", unit="cosine", better="", value=value, **layers, **by_layer)
            )
        shared = overlaps(first.adapter, second.adapter)
        if len(shared):
            value = partial(weighted_mean, sums=shared, weights=np.ones(len(shared)))
            what["rows"] = len(shared)
            out.append(Measured(quantity=f"overlap with {first.name}", unit="share", better="", value=value, **what))
    return out


def about(subject: Subject, row_name: str, rows: int, **more: str) -> dict[str, Any]:
    """What every quantity of a subject is labelled with."""
    who = {"subject": subject.name, "seed": subject.seed, "control": subject.control}
    return {**who, "rows": rows, "row_name": row_name, **more}


def pairs(bench: Bench, controls: int) -> Iterator[tuple[Subject, Subject]]:
    """Solutions of one kind and seed, two by two, and every solution with the random twins of its kind."""
    solutions = moved(bench)
    for kind, seed in dict.fromkeys((s.kind, s.seed) for s in solutions):
        group = [s for s in solutions if (s.kind, s.seed) == (kind, seed)]
        yield from combinations(group, 2)
        if seed == solutions[0].seed:
            yield from ((s, twin) for twin in twins_of(group[-1], bench, controls) for s in group)


def alignment(x: Adapter, y: Adapter) -> dict[str, Float[np.ndarray, "M L"]]:
    """<x, y>, ||x||^2 and ||y||^2 of every part and layer: what `cosine` binds. Parts of one layer (an embedding), and
    parts that only one of the two changes, hold zeros elsewhere."""
    names = list(dict.fromkeys([*x, *y]))
    found = {"both": inner(x, y), "own": inner(x, x), "other": inner(y, y)}
    layers = max(len(v) for products in found.values() for v in products.values())
    out = {key: np.zeros((len(names), layers)) for key in found}
    for key, products in found.items():
        for name, values in products.items():
            out[key][names.index(name), : len(values)] = np.asarray(values, np.float64)
    return out


def cosine(w: np.ndarray, *, both: np.ndarray, own: np.ndarray, other: np.ndarray) -> Any:
    """(w . <x, y>) / sqrt((w . ||x||^2) (w . ||y||^2)); 0 where one of them is zero."""
    size = np.sqrt((w @ own) * (w @ other))
    return np.where(size > 0, (w @ both) / np.where(size > 0, size, 1.0), 0.0)


def overlaps(x: Adapter, y: Adapter) -> Float[np.ndarray, "M"]:
    """||Q_x^T Q_y||_F^2 / min(r, r') per low-rank matrix, Q an orthonormal basis of the rows of B."""
    found = []
    for name in x:
        if name not in y or "b" not in x[name]:
            continue
        for b, c in zip(np.asarray(x[name]["b"]), np.asarray(y[name]["b"]), strict=True):
            if b.any() and c.any():
                cosines = np.linalg.svd(np.linalg.qr(b.T)[0].T @ np.linalg.qr(c.T)[0], compute_uv=False)
                found.append(float(np.mean(cosines**2)))
    return np.array(found)


def trajectory(points: list[Adapter]) -> tuple[Float[np.ndarray, "T K"], Float[np.ndarray, "K"]]:
    """Principal components of a path of solutions, from the products between its points alone: coordinates of every
    point, `K = T - 1` of them, and the share of the variance that each explains."""
    gram = np.array([[sum(float(v.sum()) for v in inner(x, y).values()) for y in points] for x in points])
    place = np.eye(len(points)) - 1 / len(points)
    values, vectors = np.linalg.eigh(place @ gram @ place)
    values, vectors = np.maximum(values[::-1], 0)[:-1], vectors[:, ::-1][:, :-1]
    return vectors * np.sqrt(values), values / max(values.sum(), 1e-30)
