"""Tables of the report: scalars by arm, the forest of differences, cosines, samples, budget.

Everything returned is plain text and numbers for the template, which escapes it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

from aif.report.wording import BETTER, counted, interval, joined, number, sentence, summary
from aif.results import Results, Sample, Scalar

REPETITIVE = 0.2  # share of repeated 4-grams from which a sample is flagged
BUDGET = {
    "seed": "seed",
    "objective": "objective",
    "steps": "steps",
    "tokens": "tokens",
    "kl_from_start": "KL from the start on held-out answers, nats/token",
    "effective_norm": "effective norm",
    "seconds": "seconds",
}
MATCHED = {"steps": "steps", "tokens": "tokens", "kl": "KL from the start on training answers, nats/token"}


def scalar_table(results: Results) -> dict[str, Any]:
    """Rows are quantities grouped by metric, columns are arms, then other solutions, then controls."""
    names = dict.fromkeys([*(a for a in results.arms), *(s.arm for s in results.scalars)])
    present = {s.arm for s in results.scalars}
    control = {s.arm for s in results.scalars if s.control and s.arm not in results.arms}
    columns = sorted((n for n in names if n in present), key=lambda n: n in control)
    metrics: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = defaultdict(dict)
    for s in results.scalars:
        row = metrics[s.metric].setdefault((s.quantity, s.unit, s.better), {})
        row[s.arm] = _cell(s)
    rows = {
        metric: [
            {"quantity": q, "unit": u, "better": BETTER[b], "cells": [row.get(c) for c in columns]}
            for (q, u, b), row in table.items()
        ]
        for metric, table in metrics.items()
    }
    return {"columns": columns, "metrics": rows} if rows else {}


def _cell(s: Scalar) -> dict[str, str]:
    value, ends = interval(s.value, s.low, s.high)
    count = counted(s.n, s.rows, s.seeds)
    small = f"n {s.n}" + (f" · seed{'s' if len(s.seeds) > 1 else ''} {', '.join(map(str, s.seeds))}" if s.seeds else "")
    exact = f"{s.value!r} [{s.low!r}, {s.high!r}] {s.unit}; {count}; 95 % interval over {s.rows}"
    return {"value": value, "ends": ends, "label": s.label, "small": small, "hover": exact}


def verdicts(results: Results) -> list[dict[str, Any]]:
    """Per arm, the count of its differences and one sentence for each, clear ones first."""
    out = []
    for arm in dict.fromkeys(d.arm for d in results.differences):
        group = [d for d in results.differences if d.arm == arm]
        group.sort(key=lambda d: d.verdict == "no difference shown")
        baseline = joined(list(dict.fromkeys(d.baseline for d in group)))
        sentences = [(d, sentence(d)) for d in group]
        out.append({"arm": arm, "summary": summary(arm, baseline, group), "sentences": sentences})
    return out


def forest(results: Results) -> list[dict[str, Any]]:
    """Differences by arm, each with its sentence and its place on a line of -1 to 1 where right favours the arm.

    Units differ between quantities, so a quantity has its own scale, shared by all arms: the largest end of its
    intervals. Where the better direction is unknown the difference is drawn as it is.
    """
    better = {(s.metric, s.quantity): s.better for s in results.scalars}
    scale: dict[tuple[str, str], float] = defaultdict(float)
    for d in results.differences:
        ends = [abs(v) for v in (d.value, d.low, d.high) if math.isfinite(v)]
        scale[d.metric, d.quantity] = max(scale[d.metric, d.quantity], *ends, 0.0)
    arms: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for d in results.differences:
        arms[d.arm, d.baseline].append(d)
    out = []
    for (arm, baseline), group in arms.items():
        rows = []
        for d in group:
            sign = -1 if better.get((d.metric, d.quantity)) == "lower" else 1
            size = scale[d.metric, d.quantity] or 1.0
            drawn = all(math.isfinite(v) for v in (d.value, d.low, d.high))
            place = sorted(sign * v / size for v in (d.low, d.high)) if drawn else [0.0, 0.0]
            value, ends = interval(d.value, d.low, d.high)
            row = {"metric": d.metric, "quantity": d.quantity, "unit": d.unit, "label": d.label, "verdict": d.verdict}
            row |= {"value": value, "ends": ends, "sentence": sentence(d), "drawn": drawn, "p": number(d.p_adjusted)}
            rows.append(row | {"left": place[0], "right": place[1], "mid": sign * d.value / size if drawn else 0.0})
        out.append({"arm": arm, "baseline": baseline, "rows": rows})
    return out


def cosine_map(results: Results) -> dict[str, Any]:
    """The matrix with a shade per cell; empty where it was not measured or its sides do not match its names."""
    names, matrix = results.cosines.get("names") or [], results.cosines.get("matrix") or []
    if not names or len(matrix) != len(names) or any(len(row) != len(names) for row in matrix):
        return {}
    floor = results.cosines.get("noise_floor")
    floor = float(floor) if isinstance(floor, int | float) else None
    rows = []
    for k, row in enumerate(matrix):
        values = [math.nan if v is None else float(v) for v in row]
        rows.append([_shaded(v, floor if j != k else None) for j, v in enumerate(values)])
    what = str(results.cosines.get("what") or "solutions")
    return {"names": [str(n) for n in names], "rows": rows, "floor": number(floor) if floor else "", "what": what}


def _shaded(value: float, floor: float | None) -> dict[str, Any]:
    known = math.isfinite(value)
    strength = min(abs(value), 1.0) if known else 0.0
    color = "59,130,196" if value >= 0 else "224,123,57"
    noise = known and floor is not None and abs(value) <= floor
    text = f"{value:.2f}".replace("-", "−") if known else "–"
    return {"text": text, "fill": f"rgba({color},{0.75 * strength:.3f})", "noise": noise}


def sample_groups(results: Results) -> list[dict[str, Any]]:
    """Samples by prompt; within a prompt by model, then dose from low to high."""
    prompts: dict[str, list[Sample]] = defaultdict(list)
    for sample in results.samples:
        prompts[sample.prompt].append(sample)
    order = {name: k for k, name in enumerate(["base", *results.arms])}
    place = lambda s: (order.get(s.arm, len(order)), s.arm, s.layer, s.dose, s.direction)  # noqa: E731
    return [{"prompt": p, "samples": [_sample(s) for s in sorted(g, key=place)]} for p, g in prompts.items()]


def _sample(s: Sample) -> dict[str, Any]:
    sign = "+" if s.dose > 0 else ""
    steered = f"along {s.direction} at layer {s.layer}" if s.direction and s.dose else "unsteered"
    return {
        "arm": s.arm,
        "dose": sign + number(s.dose),
        "how": steered,
        "text": s.text,
        "empty": not s.text.strip(),
        "badges": [
            ("tokens", number(s.tokens), False),
            ("repetition", f"{100 * s.repetition:.0f} %", s.repetition > REPETITIVE),
            ("compression", f"{s.compression:.2f}", False),
            ("perplexity", number(s.perplexity), False),
        ],
    }


def budget_table(results: Results) -> dict[str, Any]:
    """What arms were matched by, and one row per arm and seed of what each spent."""
    budget = results.budget
    if not budget.arms:
        return {}
    columns = dict(BUDGET)
    if budget.match == "kl":
        columns |= {"achieved": MATCHED["kl"]}
    matched = f"Arms are matched by {MATCHED[budget.match]}"
    matched += f": {number(budget.value)} each." if budget.value else ", as many as the config gives each."
    rows = [(s.arm, [plain(getattr(s, key)) for key in columns]) for s in budget.arms]
    return {"matched": matched, "columns": list(columns.values()), "rows": rows}


def unequal_rows(results: Results) -> list[dict[str, Any]]:
    """What the arms differ in beside their objectives, arms with the same value named together."""
    out = []
    for u in results.unequal:
        sharing: dict[str, list[str]] = defaultdict(list)
        for arm, value in u.values.items():
            sharing[value].append(arm)
        out.append({"what": u.what, "declared": u.declared, "groups": [(joined(a), v) for v, a in sharing.items()]})
    return out


def answer_rows(results: Results) -> list[dict[str, Any]]:
    """Every question with what was claimed, what was found, the verdict and its reason."""
    out = []
    for a in results.answers:
        unit = f" {a.unit}" if a.unit else ""
        claim = f"{a.quantity} ({a.metric}) of {a.arm} is {a.direction} than of {a.baseline}"
        claim += f" by more than {number(a.minimum_effect)}{unit}" if a.minimum_effect else ""
        numbers = (a.value, a.low, a.high)
        found = ("–", "") if None in numbers else interval(*numbers)  # pyright: ignore[reportArgumentType]
        row = {"id": a.id, "arm": a.arm, "claim": claim, "value": found[0], "ends": found[1], "unit": a.unit}
        p = "–" if a.p_adjusted is None else number(a.p_adjusted)
        out.append(row | {"p": p, "verdict": a.verdict, "reason": a.reason})
    return out


def plain(value: Any) -> str:
    """Any JSON value as text: numbers rounded, text as it is, the rest as JSON."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
