"""Figures of training logs: the loss of every arm, and the terms that its objective is made of."""

from __future__ import annotations

import math
from typing import Any

from aif.report.plots import Panel, Style, axes, finite, label
from aif.report.wording import BOOKKEEPING, TERMS
from aif.results import TrainingLog

SMOOTH_FROM = 60  # log lines from which a running mean is drawn over the raw line


def loss_panels(training: list[TrainingLog], look: dict[str, Style]) -> list[Panel]:
    """Loss over steps: one panel per objective, because losses of different objectives do not compare."""
    return [
        _log_panel([t for t in training if t.objective == objective], "loss", look, f"loss of {objective}")
        for objective in dict.fromkeys(t.objective for t in training)
    ]


def term_panels(training: list[TrainingLog], look: dict[str, Style]) -> dict[str, list[Panel]]:
    """Per objective, a panel for every logged term that is not the loss under another name."""
    out: dict[str, list[Panel]] = {}
    for objective in dict.fromkeys(t.objective for t in training):
        logs = [t for t in training if t.objective == objective]
        lines = [line for t in logs for line in t.lines]
        logged = dict.fromkeys(key for line in lines for key in line if key not in BOOKKEEPING)
        terms = [k for k in logged if any(line.get(k) != line.get("loss") for line in lines)]
        terms.sort(key=lambda k: list(TERMS).index(k) if k in TERMS else len(TERMS))
        if terms:
            out[objective] = [_log_panel(logs, term, look, term) for term in terms]
    return out


def _log_panel(logs: list[TrainingLog], key: str, look: dict[str, Style], title: str) -> Panel:
    data: list[dict[str, Any]] = []
    for log in logs:
        lines = [line for line in log.lines if "step" in line and key in line]
        if not lines:
            continue
        style, steps, values = look[log.arm], [line["step"] for line in lines], [line[key] for line in lines]
        trace = {"type": "scatter", "mode": "lines", "x": finite(steps), "hovertemplate": "%{y:.4g}"}
        trace["name"] = label(f"{log.arm}, seed {log.seed}")
        if len(values) >= SMOOTH_FROM:
            pale = {"y": finite(values), "line": {"color": style.shade(0.3), "width": 1}, "hoverinfo": "skip"}
            data.append({k: v for k, v in trace.items() if k != "hovertemplate"} | pale)
            values = running_mean(values, len(values) // 40)
        data.append({**trace, "y": finite(values), "line": {"color": style.color, "width": 2}})
    caption = TERMS.get(key, "")
    return Panel(title, caption, data, axes("step", ""), names=list(dict.fromkeys(log.arm for log in logs)))


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the finite values up to `window` places before and after every point."""
    out = []
    for k in range(len(values)):
        near = [v for v in values[max(0, k - window) : k + window + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out
