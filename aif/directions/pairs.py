"""Contrast pairs as plain text: a JSONL file of `{"positive": ..., "negative": ...}`, each read at its last token."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from aif.corpus.jsonl import lines, parse, refuse_foreign, regular_file
from aif.directions.contrast import mean_difference, paired_pca
from aif.directions.record import check_layer, origin, purpose, read_from
from aif.directions.texts import end_residuals
from aif.errors import BadInput
from aif.policy import bind
from aif.types import Direction

KEYS = ("positive", "negative")
LONGEST = 1 << 20  # bytes of a line


def read_pairs(path: str | Path) -> tuple[list[tuple[str, str]], str]:
    """The pairs of a file, and its hash.

    Raises:
      BadInput: naming file:line and key, where a line is not a pair of two different texts; or the file has none.
    """
    path = regular_file(path)
    refuse_foreign(path)
    digest, found = hashlib.sha256(), []
    with path.open("rb") as stream:
        for number, offset, line in lines(stream, LONGEST, digest):
            where = f"{path}:{number}"
            if line is None:
                raise BadInput(f"{where}: longer than {LONGEST} bytes; shorten the texts")
            try:
                row = parse(line, offset)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
            found.append(_pair(row, where))
    if not found:
        raise BadInput(f'{path}: has no pairs; write one {{"positive": ..., "negative": ...}} a line')
    return found, digest.hexdigest()


def _pair(row: dict[str, Any], where: str) -> tuple[str, str]:
    for key in KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise BadInput(f"{where}: {key}: must be a text that is not empty")
    if row["positive"] == row["negative"]:
        raise BadInput(f"{where}: both texts are the same; a pair must differ")
    return row["positive"], row["negative"]


def from_pairs(lm: Any, pairs: list[tuple[str, str]], *, data: str, layer: int, method: str = "pca") -> Direction:
    """The contrast of texts at their last tokens: paired PCA, or the mean difference for `method="mean"`.

    Texts are encoded as they stand, special tokens included and none added.

    Raises:
      BadInput: the layer does not exist, a text does not fit the model, or an activation is not finite.
    """
    check_layer(layer, lm.config.layers)
    texts = [lm.tokenizer.encode(text, add_special_tokens=False) for pair in pairs for text in pair]
    longest = min(lm.config.max_position, max(512, *map(len, texts)))
    seen = end_residuals(bind(lm), texts, length=longest)
    about = {**origin(lm), **read_from(seen, data, "last"), **purpose(layer), "pairs": len(pairs)}
    positive, prompts = np.arange(len(texts)) % 2 == 0, np.arange(len(texts)) // 2
    if method == "pca":
        return paired_pca(seen, positive, prompts, provenance=about)
    return mean_difference(seen, positive, provenance=about)
