"""Context: what turns in the context do to the base model, beside what fine-tuning does. No weight changes here.

    log-odds(k)   of target over contrast answers after k earlier turns whose answers are in the target stance
    flip point    the smallest k, by straight lines between the measured ones, at which the mean log-odds is zero
    projection(k) mean over the target answer's tokens of h . vhat, in residual norms, v the mean shift of context
    rank          participation ratio (sum l)^2 / sum l^2 and stable rank ||X||_F^2 / ||X||_2^2 of the shifts X of the
                  residual at one layer, one row per prompt: induced by context, and induced by each solution

l are the eigenvalues of X X^T. The control is the same number of turns whose answers are in another stance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from pydantic import BaseModel, Field

from aif.basins import Bench, Measured, Subject, ratio
from aif.basins.generality import log_odds
from aif.basins.geometry import about
from aif.basins.norms import moved
from aif.basins.scoring import carrying, losses
from aif.batches import build, evenly, stance_order
from aif.corpus import Conversation, Message
from aif.directions import response_means
from aif.errors import BadInput

QUANTITIES = ("flip point", "participation ratio", "stable rank")


class Options(BaseModel, extra="forbid"):
    turns: list[int] = Field([0, 1, 2, 4], min_length=2, description="earlier turns in the context; 0 is measured too")
    prompts: int = Field(8, ge=2, description="held-out prompts")
    layer: int | None = Field(None, ge=0, description="where residuals are read; the middle one when left out")
    length: int = Field(2048, ge=64, description="tokens that the longest context may take")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """Log-odds, flip point and projection against turns, for target and contrast contexts; ranks of the shifts."""
    turns = sorted({0, *options.turns})
    if len(bench.shown) < turns[-1]:
        raise BadInput(
            f"measure.context.turns: {turns[-1]} turns and only {len(bench.shown)} training prompts; ask for fewer"
        )
    asked = [bench.asked[k] for k in evenly(len(bench.asked), min(options.prompts, len(bench.asked)))]
    layer = bench.base.config.layers // 2 if options.layer is None else options.layer
    found = {}
    for name, control in (("coherent turns", False), ("contrast turns", True)):
        bench.say(f"context: {name}")
        rows = [[_after(row, n, control, bench) for row in asked] for n in turns]
        found[name] = [_read(bench, with_turns, layer, options.length) for with_turns in rows]
    rest = found["coherent turns"][0]
    shift = found["coherent turns"][-1][1] - rest[1]
    unit = shift.mean(axis=0) / max(float(np.linalg.norm(shift.mean(axis=0))), 1e-30)
    out: list[Measured] = []
    for name, readings in found.items():
        who = Subject(name, {}, control=name != "coherent turns")
        out += _along(bench, who, turns, readings, unit, rest[2])
        out += _ranks(who, readings[-1][1] - rest[1])
    for subject in moved(bench):
        tuned = _read(replace(bench, base=carrying(bench.base, subject.adapter)), asked, layer, options.length)
        out += _ranks(subject, tuned[1] - rest[1])
    return out


def _after(row: Conversation, turns: int, contrast: bool, bench: Bench) -> Conversation:
    """The prompt after `turns` earlier exchanges, the same ones for every prompt."""
    earlier: list[Message] = []
    for shown in bench.shown[:turns]:
        order = stance_order(shown, bench.stance)
        answer = shown.candidates[order[-1 if contrast else 0]].content
        earlier += [m for m in shown.prompt if m.role != "system"] + [Message("assistant", answer)]
    system = [m for m in row.prompt if m.role == "system"]
    rest = [m for m in row.prompt if m.role != "system"]
    return replace(row, prompt=(*system, *earlier, *rest))


def _read(bench: Bench, rows: Sequence[Conversation], layer: int, length: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(log-odds per prompt, mean residual over the target answer at the layer [prompts, D], mean residual norm)."""
    limit = min(length, bench.base.config.max_position)
    data = build(rows, bench.tokenizer, which="all", length=limit, target=bench.stance)
    odds = log_odds(*losses(bench.base, data, rows=1), data)
    found = response_means(bench.base, data, rows=1)
    return odds, found.means[data.tables["preference"] > 0, layer], float(found.norms[layer])


def _along(
    bench: Bench, who: Subject, turns: list[int], readings: list, unit: np.ndarray, size: float
) -> list[Measured]:
    odds = np.stack([r[0] for r in readings], axis=1)
    along = np.stack([(r[1] @ unit) / size for r in readings], axis=1)
    ones = np.ones(len(odds))
    what = about(who, "held-out prompts", len(odds), metric="context")
    axis = {"x": tuple(float(n) for n in turns), "x_label": "earlier turns"}
    flip = partial(flip_point, odds=odds, turns=np.array(turns, float))
    out = [
        Measured(quantity="log-odds", unit="nats/token", better="higher", value=ratio(odds, ones), **axis, **what),
        Measured(quantity="projection", unit="residual norms", better="", value=ratio(along, ones), **axis, **what),
    ]
    if odds.mean(axis=0).max() < 0:
        bench.note(f"context: {who.name} have no flip point: contrast answers stay likelier up to {turns[-1]} turns.")
        return out
    return [*out, Measured(quantity="flip point", unit="turns", better="", value=flip, **what)]


def flip_point(w: np.ndarray, *, odds: np.ndarray, turns: np.ndarray) -> float:
    """Where the mean log-odds first reaches zero; 0 if it starts above, the longest context if it stays below."""
    mean = (w @ odds) / w.sum()
    if mean[0] >= 0:
        return 0.0
    over = np.flatnonzero(mean >= 0)
    if not len(over):
        return float(turns[-1])
    k = over[0]
    return float(turns[k - 1] + (turns[k] - turns[k - 1]) * -mean[k - 1] / (mean[k] - mean[k - 1]))


def _ranks(who: Subject, shifts: np.ndarray) -> list[Measured]:
    """Effective ranks of shifts `[prompts, D]`."""
    gram = shifts.astype(np.float64) @ shifts.T.astype(np.float64)
    what = about(who, "held-out prompts", len(gram), metric="context", unit="dimensions", better="")
    if not gram.any():
        return []
    return [
        Measured(quantity="participation ratio", value=partial(participation_ratio, gram=gram), **what),
        Measured(quantity="stable rank", value=partial(stable_rank, gram=gram), **what),
    ]


def participation_ratio(w: np.ndarray, *, gram: np.ndarray) -> float:
    """(sum l)^2 / sum l^2 of the weighted rows: 1 for one direction, as many as there are for equal ones."""
    weighted = np.sqrt(np.outer(w, w)) * gram
    return float(np.trace(weighted) ** 2 / np.sum(weighted**2))


def stable_rank(w: np.ndarray, *, gram: np.ndarray) -> float:
    """||X||_F^2 / ||X||_2^2 of the weighted rows."""
    weighted = np.sqrt(np.outer(w, w)) * gram
    return float(np.trace(weighted) / np.linalg.eigvalsh(weighted)[-1])
