"""Geometry: which way solutions lie from the base model, and how near one another.

    cos(x, y) = <x, y> / (||x|| ||y||)   of the weight changes, over all layers and layer by layer, without building A B
    overlap   = mean of the squared cosines of the principal angles between what B and B' write to

Rows are the changed matrices (one per part and layer), so an interval says how even the agreement is over the model.
Unrelated directions of D dimensions have |cos| of about 1 / sqrt(D), and unrelated r-dimensional spaces an overlap of
r / D: the random twin shows both. Solutions that share a first stage share its change.

Where training kept waypoints, their paths are shown on the principal components of all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

COMPONENTS = 2  # of the paths
QUANTITIES = ("cosine with {arm}", "overlap with {arm}")  # of every solution with those before it


class Options(BaseModel, extra="forbid"):
    controls: int = Field(1, ge=0, description="random twins per kind of solution")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """For every pair of solutions of a kind and seed: cosine, cosine per layer, and overlap of low-rank spaces."""
    bench.say("geometry")
    out: list[Measured] = []
    for first, second in pairs(bench, options.controls):
        products = alignment(first.adapter, second.adapter)
        flat = moving({name: x.ravel() for name, x in products.items()})
        what = about(second, "weight matrices", len(flat["both"]), metric="geometry")
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
    return out + paths(bench)


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


def moving(products: dict[str, Float[np.ndarray, "M ..."]]) -> dict[str, Float[np.ndarray, "N ..."]]:
    """Without the matrices that nothing changes, which an interval over matrices must not draw: a vector has one."""
    some = np.any([x.reshape(len(x), -1).any(axis=1) for x in products.values()], axis=0)
    return {name: x[some] for name, x in products.items()}


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


def paths(bench: Bench) -> list[Measured]:
    """The ways that the arms took, in the plane that holds most of them: principal components of all their waypoints
    together, and the share of the variance that each has. Of the first seed: another has components of its own."""
    if not bench.paths:
        return []
    seed = next(iter(bench.paths))[1]
    ways = {arm: way for (arm, s), way in bench.paths.items() if s == seed}
    bench.say(f"geometry: paths of {', '.join(ways)}")
    found = moving({"products": products([x for way in ways.values() for x in way.values()])})
    parts, variance = components(found["products"], COMPONENTS)
    what = {"metric": "geometry", "better": "", "row_name": "weight matrices", "rows": len(parts)}
    out, first = [], 0
    for arm, way in ways.items():
        own, first = parts[:, first : first + len(way)], first + len(way)
        axis = {"x": tuple(map(float, way)), "x_label": "steps", "subject": arm, "seed": seed, "control": False}
        for k in range(own.shape[2]):
            value = partial(summed, parts=own[:, :, k])
            out.append(Measured(quantity=f"path, component {k + 1}", unit="norm", value=value, **axis, **what))
    everyone = {"subject": "all paths", "seed": seed, "control": False}
    for k in range(parts.shape[2]):
        value = partial(share, part=variance[:, k], whole=variance.sum(axis=1))
        out.append(Measured(quantity=f"variance along component {k + 1}", unit="%", value=value, **everyone, **what))
    return out


def products(points: Sequence[Adapter]) -> Float[np.ndarray, "M T T"]:
    """<x_s, x_t> of every pair of points, per part and layer."""
    out = None
    for s, x in enumerate(points):
        for t, y in enumerate(points[: s + 1]):
            each = np.concatenate([np.asarray(v, np.float64) for v in inner(x, y).values()])
            out = np.zeros((len(each), len(points), len(points))) if out is None else out
            out[:, s, t] = out[:, t, s] = each
    assert out is not None
    return out


def components(
    products: Float[np.ndarray, "M T T"], count: int
) -> tuple[Float[np.ndarray, "M T K"], Float[np.ndarray, "M T"]]:
    """Principal components of points from their products alone, as sums over weight matrices m.

    Coordinates of point t are sum_m [m, t, k] (the first `count` components that are not nothing); the variance along
    component k is sum_m [m, k], largest first: l_k = sum_m v_k' J P_m J v_k with J = 1 - 1/T and J P J v_k = l_k v_k.
    """
    T = products.shape[1]
    place = np.eye(T) - 1 / T
    centred = place @ products @ place
    values, vectors = np.linalg.eigh(centred.sum(axis=0))
    values, vectors = values[::-1], vectors[:, ::-1]
    count = min(count, int((values > 1e-9 * max(values[0], 1e-30)).sum()))
    parts = centred @ vectors[:, :count] / np.sqrt(values[:count])
    places = parts.sum(axis=0)
    parts = parts * np.sign(places[np.abs(places).argmax(axis=0), np.arange(count)])  # the farthest point is positive
    return parts, np.einsum("tk,mts,sk->mk", vectors, centred, vectors)


def summed(w: np.ndarray, *, parts: np.ndarray) -> Any:
    """sum_m w_m parts_m."""
    return w @ parts


def share(w: np.ndarray, *, part: np.ndarray, whole: np.ndarray) -> Any:
    """100 (w . part) / (w . whole), percent."""
    return 100 * (w @ part) / (w @ whole)
