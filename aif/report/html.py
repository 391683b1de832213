"""`render`: results -> one HTML file that needs no network.

The page carries plotly once, a content security policy that forbids every load, and the figures as JSON. Text from
models, data and configs reaches it only through autoescape or through `embedded`.
"""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from aif.errors import BadInput
from aif.report import tables
from aif.report.basin_map import map_panels
from aif.report.paths import path_panels
from aif.report.plots import Panel, Style, bar_panels, curve_panels, styles
from aif.report.radar import radar_panel
from aif.report.training import loss_panels, term_panels
from aif.report.wording import METRICS, compared, number
from aif.results import Results

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render(results: Results, out: Path) -> Path:
    """Write the report of `results` to the file `out`, whole or not at all.

    Returns:
      `out`.

    Raises:
      BadInput: plotly is missing.
    """
    shown = content(results)
    return write_page(page("report.html", shown.pop("drawn"), **shown), out)


def page(template: str, panels: list[Panel], **shown: Any) -> str:
    """A template of this package with its panels as figures; all other text is escaped.

    Raises:
      BadInput: plotly is missing.
    """
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "plain": tables.plain, "pretty": pretty}
    figures = embedded([{"data": p.data, "layout": p.layout} for p in panels]) if panels else ""
    source = Markup(plotly_source())
    return made.get_template(template).render(plotly=source, policy=POLICY, panels=panels, figures=figures, **shown)


def write_page(text: str, out: Path) -> Path:
    """Write a page, whole or not at all."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_bytes(text.encode("utf-8", errors="replace"))
    temporary.replace(out)
    return out


def plotly_source() -> str:
    """The whole of plotly's JavaScript."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise BadInput("report: plotly is not installed; install it with `pip install aif[report]`") from error
    return get_plotlyjs()


def content(results: Results) -> dict[str, Any]:
    """Everything the template shows. A section without data is empty and is left out by the template."""
    look = styles(results)
    metrics = metric_sections(results)
    training = {
        "losses": loss_panels(results.training, look),
        "terms": term_panels(results.training, look),
        "skipped": sum(line.get("skipped", 0) > 0 for log in results.training for line in log.lines),
    }
    radar = profile_panel(results, look)
    panels = [p for m in metrics for p in m["panels"]] + ([radar] if radar else [])
    panels += [*training["losses"], *(p for group in training["terms"].values() for p in group)]
    numbers = count()
    ids = {id(panel): next(numbers) for panel in panels}
    return {
        "r": results,
        "compared": compared(results),
        "verdicts": tables.verdicts(results),
        "forest": tables.forest(results),
        "table": tables.scalar_table(results),
        "training": training if results.training else {},
        "metrics": metrics,
        "radar": radar,
        "cosines": tables.cosine_map(results),
        "samples": tables.sample_groups(results),
        "repetitive": tables.REPETITIVE,
        "budget": tables.budget_table(results),
        "unequal": tables.unequal_rows(results),
        "answers": tables.answer_rows(results),
        "look": look,
        "number_of": lambda panel: ids[id(panel)],
        "drawn": panels,
    }


def profile_panel(results: Results, look: dict[str, Style]) -> Panel | None:
    """The profiles of all arms in one radar plot; None without profiles."""
    if not results.profiles:
        return None
    first = results.profiles[0]
    means = {p.arm: p.mean for p in results.profiles}
    caption = f"Mean levels of {first.answers} answers of each to held-out prompts, read by {first.reader}."
    return radar_panel("profiles", caption, means, first.dimensions, first.levels, look)


def metric_sections(results: Results) -> list[dict[str, Any]]:
    """A section per metric: known metrics in their order, then any other. Curves where there are some, else bars."""
    look = styles(results)
    found = dict.fromkeys([*(c.metric for c in results.curves), *(s.metric for s in results.scalars)])
    names = [*(m for m in METRICS if m in found), *(m for m in found if m not in METRICS)]
    out = []
    for name in names:
        curves = [c for c in results.curves if c.metric == name]
        panels: list[Panel] = curve_panels(curves, look)
        grids = {(p.title, tuple(p.names)) for p in panels}
        split = len({title for title, _ in grids}) < len(panels)
        scalars = [s for s in results.scalars if s.metric == name]
        panels = panels or bar_panels(scalars, look)
        panels += [*map_panels(name, scalars, look), *path_panels(curves, scalars, look)]
        shown = list(dict.fromkeys(n for p in panels for n in p.names))
        out.append({"name": name, "about": METRICS.get(name, ""), "panels": panels, "shown": shown, "split": split})
    return out


def embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: no tag can close it and no line separator can break it."""
    text = json.dumps(_clean(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, code in UNSAFE.items():
        text = text.replace(character, code)
    return Markup(text)


def _clean(value: Any) -> Any:
    """Numbers that JSON cannot hold become null."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pretty(value: Any) -> str:
    """Indented JSON for reading; the template escapes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
