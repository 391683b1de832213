"""Figures from records, as plain dictionaries in plotly's JSON format.

Every figure is one panel, so that a page lays panels out by its own width. Colours are one per arm in all panels;
controls are grey and dashed. Text that comes from records is escaped, because plotly reads a few HTML tags in labels.
"""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from os.path import commonprefix
from typing import Any

from aif.report.wording import BETTER, counted, meaning
from aif.results import Curve, Results, Scalar

PALETTE = ("#3b82c4", "#e07b39", "#2f9e77", "#a862b8", "#c9a227", "#d1495b", "#4aa8b8", "#8f6f5a", "#7a86d1", "#8fae3c")
GREY = "#8b8f96"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon", "triangle-down", "pentagon")
DASHES = ("dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True)
class Style:
    """How one arm looks everywhere."""

    color: str
    symbol: str = "circle"
    dash: str = "solid"
    control: bool = False

    def shade(self, alpha: float) -> str:
        """The colour with transparency."""
        red, green, blue = (int(self.color[k : k + 2], 16) for k in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha})"


@dataclass(frozen=True)
class Panel:
    """One figure: `title` and `caption` are plain text for the page, `data` and `layout` are for plotly."""

    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    better: str = ""
    names: list[str] = field(default_factory=list)
    controls: bool = False


def styles(results: Results) -> dict[str, Style]:
    """A style for every name in the results: arms in their order first, then the rest, controls in grey."""
    measured = [*results.scalars, *results.curves]
    controls = list(dict.fromkeys(m.arm for m in measured if m.control and m.arm not in results.arms))
    others = [m.arm for m in measured] + [t.arm for t in results.training] + [s.arm for s in results.samples]
    others += [p.arm for p in results.profiles]
    names = [n for n in dict.fromkeys([*results.arms, *others]) if n not in controls]
    out = {n: Style(PALETTE[k % len(PALETTE)], SYMBOLS[k % len(SYMBOLS)]) for k, n in enumerate(names)}
    out |= {n: Style(GREY, "circle-open", DASHES[k % len(DASHES)], True) for k, n in enumerate(controls)}
    return out


def label(text: str, width: int = 0) -> str:
    """Text for a plotly label: tags shown as they are, long text cut, wrapped when `width` is given."""
    short = textwrap.shorten(text, 90, placeholder=" …") or text[:90]
    lines = textwrap.wrap(short, width, break_on_hyphens=False) if width else [short]
    return "<br>".join(escape(line, quote=False) for line in lines)


def finite(values: Iterable[float]) -> list[float | None]:
    """Values with a gap where there is no number."""
    return [float(v) if math.isfinite(v) else None for v in values]


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Layout with titled axes."""
    return {"xaxis": {"title": {"text": label(x)}}, "yaxis": {"title": {"text": label(y)}}, **more}


def curve_panels(curves: list[Curve], look: dict[str, Style]) -> list[Panel]:
    """One panel per quantity and grid, in the order of the records."""
    groups: list[list[Curve]] = []
    for curve in curves:
        home = next((g for g in groups if _same_panel(g[0], curve)), None)
        if home is None:
            groups.append([curve])
        else:
            home.append(curve)
    return [_curve_panel(group, look) for group in groups]


def _same_panel(a: Curve, b: Curve) -> bool:
    """Same quantity on the same axis. Norms compare only on one grid: those of weights and vectors differ in kind."""
    if (a.metric, a.quantity, a.unit, a.x_label) != (b.metric, b.quantity, b.unit, b.x_label):
        return False
    return a.x == b.x or "norm" not in a.x_label


def _curve_panel(group: list[Curve], look: dict[str, Style]) -> Panel:
    first = group[0]
    about = meaning(first.metric, first.quantity, first.unit, first.x_label)
    data = [trace for c in sorted(group, key=lambda c: not c.control) for trace in _band_and_line(c, look[c.arm])]
    layout = axes(first.x_label, first.unit)
    if about.line:
        layout |= _marked(*about.line)
    counts = "; ".join(dict.fromkeys(counted(c.n, c.rows, c.seeds) for c in group if not c.control))
    caption = f"{about.text} {counts or counted(first.n, first.rows, first.seeds)}."
    names = list(dict.fromkeys(c.arm for c in group))
    controls = any(c.control for c in group)
    return Panel(first.quantity, caption, data, layout, BETTER[about.better], names, controls)


def _marked(level: float, name: str) -> dict[str, Any]:
    """A horizontal line at a level that has a name."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
    note = {"xref": "paper", "x": 0, "xanchor": "left", "y": level, "yanchor": "bottom", "text": label(name)}
    return {
        "shapes": [{**line, "line": {"color": GREY, "width": 1, "dash": "dot"}}],
        "annotations": [{**note, "showarrow": False, "font": {"size": 11, "color": GREY}}],
    }


def _band_and_line(curve: Curve, style: Style) -> list[dict[str, Any]]:
    """The interval as a band, and the values over it."""
    x, low, high = finite(curve.x), finite(curve.low), finite(curve.high)
    edge = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    line = {"color": style.color, "width": 1.6 if style.control else 2.2, "dash": style.dash}
    return [
        {**edge, "y": high},
        {**edge, "y": low, "fill": "tonexty", "fillcolor": style.shade(0.12 if style.control else 0.17)},
        {
            "type": "scatter",
            "mode": "lines" if style.control else "lines+markers",
            "name": label(curve.arm),
            "x": x,
            "y": finite(curve.value),
            "customdata": [list(pair) for pair in zip(low, high, strict=True)],
            "line": line,
            "marker": {"symbol": style.symbol, "size": 6},
            "hovertemplate": "%{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]",
        },
    ]


def bar_panels(scalars: list[Scalar], look: dict[str, Style]) -> list[Panel]:
    """Numbers without a curve: bars with intervals, quantities of one unit side by side, one bar per arm."""
    units: dict[str, list[Scalar]] = defaultdict(list)
    for scalar in scalars:
        units[scalar.unit].append(scalar)
    return [_bar_panel(group, look) for group in units.values()]


def _bar_panel(group: list[Scalar], look: dict[str, Style]) -> Panel:
    names = list(dict.fromkeys(s.arm for s in group))
    data = []
    for name in names:
        own, style = [s for s in group if s.arm == name], look[name]
        error = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": GREY}
        error["array"] = finite(s.high - s.value for s in own)
        error["arrayminus"] = finite(s.value - s.low for s in own)
        trace = {"type": "bar", "name": label(name), "x": [label(s.quantity, 24) for s in own], "error_y": error}
        trace |= {"y": finite(s.value for s in own), "customdata": [[*finite((s.low, s.high))] for s in own]}
        trace |= {"marker": {"color": style.shade(0.45 if style.control else 0.85)}}
        data.append(trace | {"hovertemplate": "%{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"})
    directions = {s.better for s in group}
    counts = {s.quantity: counted(s.n, s.rows, s.seeds) for s in group if not s.control}
    caption = "; ".join(f"{q}: {c}" for q, c in counts.items())
    if len(set(counts.values())) == 1:
        caption = next(iter(counts.values()))
    layout = axes("", group[0].unit, barmode="group", bargap=0.35, bargroupgap=0.12)
    better = BETTER[directions.pop()] if len(directions) == 1 else ""
    title = shared_title([s.quantity for s in group])
    return Panel(title, f"{caption}." if caption else "", data, layout, better, names, any(s.control for s in group))


def shared_title(quantities: list[str]) -> str:
    """The quantity, or the words that all of several quantities begin with."""
    shared = commonprefix(quantities)
    if shared in quantities:
        return shared or "values"
    words = shared.rpartition(" ")[0]
    return f"{words} …" if words else "values"
