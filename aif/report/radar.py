"""Radar plots of profiles: one ring per level of the scale, one spoke per dimension, one polygon per system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aif.report.plots import GREY, Panel, Style, finite, label


def radar_panel(
    title: str,
    caption: str,
    profiles: Mapping[str, Mapping[str, float | None]],
    dimensions: Mapping[str, str],
    levels: Sequence[str],
    look: Mapping[str, Style],
) -> Panel:
    """Mean levels by name and dimension id; a dimension without a number leaves a gap."""
    data = [
        _polygon(name, [means.get(d) for d in dimensions], dimensions, look[name]) for name, means in profiles.items()
    ]
    ring = {"gridcolor": GREY, "linecolor": GREY, "gridwidth": 0.5}
    radial = {
        "range": [0, len(levels) - 1],
        "tickvals": list(range(len(levels))),
        "ticktext": [label(x) for x in levels],
    }
    layout = {"polar": {"bgcolor": "rgba(0,0,0,0)", "radialaxis": {**radial, **ring}, "angularaxis": ring}}
    return Panel(title, caption, data, {**layout, "height": 460}, names=list(profiles))


def _polygon(name: str, means: list[float | None], dimensions: Mapping[str, str], style: Style) -> dict[str, Any]:
    spokes = [label(text, 16) for text in dimensions.values()]
    values = finite(float("nan") if m is None else m for m in means)
    return {
        "type": "scatterpolar",
        "mode": "lines+markers",
        "name": label(name),
        "r": [*values, values[0]],
        "theta": [*spokes, spokes[0]],
        "line": {"color": style.color, "width": 2, "dash": style.dash},
        "marker": {"symbol": style.symbol, "size": 5},
        "fill": "toself",
        "fillcolor": style.shade(0.1),
        "hovertemplate": "%{theta}: %{r:.2f}",
    }
