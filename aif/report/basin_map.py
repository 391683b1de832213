"""A map of the basins: solutions as points whose distances are the loss barriers between them, or their angles.

    barrier map: d_ij = barrier between i and j, nats per token        cosine map: d_ij = sqrt(2 (1 - cos_ij))

laid out in two dimensions by classical scaling (Torgerson 1952): the two leading eigenvectors of -J d^2 J / 2.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from aif.report.plots import Panel, Style, label
from aif.results import Scalar

MAPS = {
    ("connectivity", "barrier from "): "by loss barrier",
    ("geometry", "cosine with "): "by direction cosine",
}


def map_panels(metric: str, scalars: list[Scalar], look: dict[str, Style]) -> list[Panel]:
    """The map of a metric that compares solutions two by two, one for every set of at least three solutions."""
    out = []
    for (name, prefix), title in MAPS.items():
        if name == metric:
            for names, distance in groups(scalars, prefix):
                out.append(_panel(f"Basin map {title}", names, distance, look))
    return out


def groups(scalars: list[Scalar], prefix: str) -> list[tuple[list[str], Float[np.ndarray, "K K"]]]:
    """Sets of solutions that were all compared with one another, and their distances; controls are left out."""
    value = {}
    for s in scalars:
        if s.quantity.startswith(prefix) and not s.control and math.isfinite(s.value):
            pair = frozenset((s.arm, s.quantity.removeprefix(prefix)))
            value[pair] = math.sqrt(max(2 - 2 * s.value, 0)) if prefix.startswith("cosine") else max(s.value, 0.0)
    left, out = list(dict.fromkeys(name for pair in value for name in sorted(pair))), []
    while left:
        group: list[str] = []
        for name in left:
            if all(frozenset((name, other)) in value for other in group):
                group.append(name)
        left = [name for name in left if name not in group]
        if len(group) > 2:
            each = [[0.0 if a == b else value[frozenset((a, b))] for b in group] for a in group]
            out.append((group, np.array(each)))
    return out


def classical_scaling(distance: Float[np.ndarray, "K K"]) -> tuple[Float[np.ndarray, "K 2"], float]:
    """(coordinates, share of the squared distances that two dimensions hold)."""
    K = len(distance)
    centre = np.eye(K) - 1 / K
    values, vectors = np.linalg.eigh(-centre @ distance**2 @ centre / 2)
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    total = np.abs(values).sum()
    return places, float(np.maximum(values[::-1][:2], 0).sum() / total) if total else 1.0


def _panel(title: str, names: list[str], distance: np.ndarray, look: dict[str, Style]) -> Panel:
    places, share = classical_scaling(distance)
    data = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": label(name),
            "x": [float(x)],
            "y": [float(y)],
            "text": [label(name)],
            "textposition": "top center",
            "marker": {"color": look[name].color, "symbol": look[name].symbol, "size": 12},
            "hovertemplate": label(name),
        }
        for name, (x, y) in zip(names, places, strict=True)
    ]
    held = f"two dimensions hold {100 * share:.0f} % of the distances"
    caption = f"Near is alike; the axes have no meaning of their own, and {held}."
    equal = {"yaxis": {"title": {"text": ""}, "scaleanchor": "x"}, "xaxis": {"title": {"text": ""}}}
    return Panel(title, caption, data, equal, "", names)
