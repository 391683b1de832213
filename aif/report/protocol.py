"""Two systems on one protocol as a self-contained HTML page: radar plots turn by turn, and the answers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aif.report.html import page, write_page
from aif.report.plots import PALETTE, SYMBOLS, Panel, Style
from aif.report.radar import radar_panel


def render_protocol(found: dict[str, Any], out: Path) -> Path:
    """Write the page of what `aif.protocols.profiles.compared` found, whole or not at all.

    Raises:
      BadInput: plotly is missing.
    """
    names = found["systems"]
    look = {name: Style(PALETTE[k], SYMBOLS[k]) for k, name in enumerate(names)}
    panels = [_panel(turn, side, found, look) for turn, side in found["turns"].items()]
    about = {"names": names, "look": look, "turns": found["turns"], "dimensions": found["dimensions"]}
    return write_page(page("protocol.html", panels, answers=found["answers"], **about), out)


def _panel(turn: str, side: dict[str, Any], found: dict[str, Any], look: dict[str, Style]) -> Panel:
    means = {name: p["mean"] for name, p in zip(found["systems"], side["profiles"], strict=True)}
    counts = " and ".join(str(p["answers"]) for p in side["profiles"])
    apart = "not known" if side["distance"] is None else f"{side['distance']:.3f}"
    caption = f"Mean levels of {counts} answers; distance {apart}: root mean square difference as a share of the scale."
    return radar_panel(turn, caption, means, found["dimensions"], found["levels"], look)
