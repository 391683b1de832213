"""The paths of training: every arm's waypoints in the plane of the two leading principal components of all of them."""

from __future__ import annotations

from typing import Any

from aif.report.plots import Panel, Style, finite, label
from aif.results import Curve, Scalar

COORDINATE, SHARE = "path, component ", "variance along component "


def path_panels(curves: list[Curve], scalars: list[Scalar], look: dict[str, Style]) -> list[Panel]:
    """One panel with the first component across and the second up; none where the results hold no two components."""
    across, up = ({c.arm: c for c in curves if c.quantity == f"{COORDINATE}{k}"} for k in (1, 2))
    data = [_way(across[arm], up[arm], look[arm]) for arm in across if arm in up]
    if not data:
        return []
    held = sum(s.value for s in scalars if s.quantity.startswith(SHARE))
    seed = next(iter(across.values())).seeds[0]
    caption = (
        "Where the weights of every arm were as its training went on, from the common start (open) to the solution. "
        f"The plane holds {held:.0f} % of the variance of these points; coordinates are effective norms. Seed {seed}."
    )
    same = {"scaleanchor": "x", "title": {"text": "component 2"}}
    layout = {"xaxis": {"title": {"text": "component 1"}}, "yaxis": same}
    return [Panel("Paths of training", caption, data, layout, "", [arm for arm in across if arm in up])]


def _way(x: Curve, y: Curve, style: Style) -> dict[str, Any]:
    symbols = [f"{style.symbol}-open", *[style.symbol] * (len(x.x) - 1)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(x.arm),
        "x": finite(x.value),
        "y": finite(y.value),
        "text": [f"step {step:.0f}" for step in x.x],
        "line": {"color": style.color, "width": 2},
        "marker": {"symbol": symbols, "size": 8},
        "hovertemplate": "%{text}",
    }
