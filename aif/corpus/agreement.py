"""How far two raters of the same answers agree, dimension by dimension."""

from __future__ import annotations

from typing import Any

from aif.corpus.conversation import Corpus
from aif.corpus.nexus import Scale
from aif.corpus.ratings import quadratic_kappa
from aif.errors import BadInput


def agreement(first: Corpus, second: Corpus, scale: Scale) -> dict[str, Any]:
    """Quadratic-weighted kappa per dimension over the answers that both files rate.

    An answer is the same where its row's id and its words are. Returns per dimension the answers rated by both
    (`answers`), `kappa` (None where it is not defined) and the share of equal ratings (`equal`).

    Raises:
      BadInput: the files rate no answer in common.
    """
    ours, theirs = (_ratings(corpus) for corpus in (first, second))
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise BadInput(
            f"{second.path}: no answer has the id and the words of one in {first.path}; rate the same answers"
        )
    found = {}
    for d in scale.dimensions:
        pairs = [(ours[k][d.id], theirs[k][d.id]) for k in shared if d.id in ours[k] and d.id in theirs[k]]
        a, b = [x for x, _ in pairs], [y for _, y in pairs]
        kappa = quadratic_kappa(a, b, len(scale.levels))
        equal = sum(x == y for x, y in pairs) / len(pairs) if pairs else None
        found[d.id] = {"answers": len(pairs), "kappa": None if kappa != kappa else kappa, "equal": equal}
    return {"answers": len(shared), "dimensions": found}


def _ratings(corpus: Corpus) -> dict[tuple[str, str], dict[str, int]]:
    return {(row.id, c.content): c.ratings for row in corpus.rows for c in row.candidates}


__all__ = ["agreement"]
