"""Pre-training significance: how far the solution moves next-token predictions on pre-training-like text.

    S(x, n) = mean over texts and tokens of KL( P_base(. | text) || P_base+x(. | text) ),   x at effective norm n

full vocabulary, nats per token, padding left out, raw text without a chat template, all tokens steered, at n = factor
times the mean own norm of the solutions of a kind. Controls: Gaussian twins with the same norm in every module.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from aif.basins import Bench, Measured, Subject, ratio
from aif.basins.norms import Grid, at_norm, grids
from aif.basins.scoring import grid_divergences
from aif.batches import Dataset, build
from aif.corpus import Candidate, Conversation
from aif.corpus.pretraining import texts
from aif.own_text import OwnText

QUANTITIES = ("KL at the common norm",)


class Options(BaseModel, extra="forbid"):
    source: str = Field(
        "pydoc",
        description="pre-training-like text: `pydoc`, `fineweb`, hub:OWNER/NAME, a .txt, .jsonl or .parquet file, or "
        "`samples` of the base model's own",
    )
    texts: int = Field(32, ge=1)
    tokens: int = Field(256, ge=8, description="tokens per text")
    factors: list[float] = Field([0.25, 0.5, 0.75, 1.0, 1.5, 2.0], min_length=1)
    controls: int = Field(1, ge=0)


def text_data(bench: Bench, options: Options) -> Dataset:
    """The texts, cut to `tokens` tokens each, one to a row."""
    own = OwnText(bench.base, bench.tokenizer, options.texts, options.tokens)
    source = own if options.source == own.name else options.source
    rows = []
    for number, text in enumerate(texts(source, options.texts, max_chars=8 * options.tokens)):
        ids = bench.tokenizer.encode(text, add_special_tokens=False)[: options.tokens - 8]
        cut = bench.tokenizer.decode(ids)
        rows.append(_as_row(cut, number))
    return build(rows, bench.tokenizer, which="target", length=options.tokens, target="")


def _as_row(text: str, number: int) -> Conversation:
    candidate = Candidate(content=text, stance="", ratings={}, extra={})
    return Conversation(
        id=f"text-{number}",
        prompt=(),
        candidates=(candidate,),
        domain="",
        language="",
        split="",
        kind="text",
        where=f"text {number}",
        train_turns=False,
        extra={},
    )


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The curve S(n) and S at the common norm, per subject and per random twin."""
    data = text_data(bench, options)
    measured = [(s, grid) for grid in grids(bench, options.factors, options.controls) for s in grid.subjects]
    bench.say(f"significance: {', '.join(s.name for s, _ in measured)}")
    families, points = [at_norm(s) for s, _ in measured], [grid.points for _, grid in measured]
    each, tokens = grid_divergences(bench.base, families, points, data, rows=bench.rows)
    return [m for (s, grid), part in zip(measured, each, strict=True) for m in _quantities(s, grid, part, tokens)]


def _quantities(subject: Subject, grid: Grid, sums: np.ndarray, tokens: np.ndarray) -> list[Measured]:
    what = {"metric": "significance", "subject": subject.name, "seed": subject.seed, "control": subject.control}
    what |= {"rows": len(tokens), "row_name": "texts", "unit": "nats/token", "better": "higher"}
    axis = {"x": tuple(grid.norms.tolist()), "x_label": "effective norm"}
    return [
        Measured(quantity="KL from the base model", value=ratio(sums, tokens), **axis, **what),
        Measured(quantity="KL at the common norm", value=ratio(sums[:, grid.common], tokens), **what),
    ]
