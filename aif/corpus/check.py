"""What a corpus is like, in numbers: balance, lengths, repetition, ratings, how far words alone tell its stances."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aif.corpus.conversation import Candidate, Conversation, Corpus
from aif.corpus.nexus import Scale
from aif.corpus.ratings import profile

SHARED = 12  # words in a row that two answers written apart do not have in common
SHOWN = 20
WORDS_PROMPTS = 500


class Answer(NamedTuple):
    """An answer with its row and its words in lower case."""

    row: Conversation
    candidate: Candidate
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row.id}/{self.candidate.stance}" if self.candidate.stance else self.row.id


def check(corpus: Corpus, scale: Scale, folds: int = 10) -> dict[str, Any]:
    """Statistics of a corpus, ready for JSON; a number that cannot be computed is None.

    Returns: counts of rows by kind, split, language and domain (with its splits); answers per stance with their
    lengths in words, share of different 3-grams, mean and variance of every rated dimension and the dimensions pinned
    low; `length_spread`, the largest relative distance of a stance's mean length from the mean of all; answers that
    share 12 words in a row; answers and prompts that occur twice; prompts that stand in training and in a held-out
    split; messages with control characters; and, where
    scikit-learn is installed, how well a bag of words tells the stances of prompts it was not fitted on, in `folds`
    folds.
    """
    answers = [Answer(row, c, words(c.content)) for row in corpus.rows for c in row.candidates]
    stances = sorted({a.candidate.stance for a in answers})
    groups = {s: [a for a in answers if a.candidate.stance == s] for s in stances}
    overall = _length(answers)
    return {
        "path": str(corpus.path),
        "sha256": corpus.sha256,
        "rows": len(corpus.rows),
        "skipped": len(corpus.skipped),
        "kinds": _counts(row.kind for row in corpus.rows),
        "splits": _counts(row.split for row in corpus.rows),
        "languages": _counts(row.language for row in corpus.rows),
        "domains": _domains(corpus),
        "stances": {s: _stance(group, scale) for s, group in groups.items()},
        "length_spread": _number(max((abs(_length(g) / overall - 1) for g in groups.values()), default=math.nan)),
        "shared_12_grams": shared_ngrams(answers),
        "repeated_answers": _repeated(a.candidate.content for a in answers),
        "repeated_prompts": _repeated(row.prompt for row in corpus.rows if row.prompt),
        "split_overlap": overlap(
            [row for row in corpus.rows if not row.split.startswith("heldout")],
            [row for row in corpus.rows if row.split.startswith("heldout")],
        ),
        "control_characters": sum(_controls(text) for text in _texts(corpus)),
        "bag_of_words": bag_of_words(answers, folds),
    }


def overlap(trained: Sequence[Conversation], heldout: Sequence[Conversation]) -> dict[str, Any]:
    """How many held-out prompts are asked in training too, under whatever id, and the first of them by line."""
    asked = {_asked(row): row.where for row in trained}
    twice = [[asked[_asked(row)], row.where] for row in heldout if _asked(row) in asked]
    return {"prompts": len(twice), "first": twice[:SHOWN]}


def _asked(row: Conversation) -> Any:
    return row.prompt or row.candidates[0].content


def words(text: str) -> tuple[str, ...]:
    """Words of a text in lower case, without punctuation."""
    return tuple(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower()))


def shared_ngrams(answers: list[Answer], size: int = SHARED) -> dict[str, Any]:
    """How many pairs of answers have `size` words in a row in common, and the first of them."""
    first: dict[tuple[str, ...], int] = {}
    pairs: dict[tuple[int, int], str] = {}
    for number, answer in enumerate(answers):
        for gram in zip(*(answer.words[k:] for k in range(size)), strict=False):
            other = first.setdefault(gram, number)
            if other != number:
                pairs.setdefault((other, number), " ".join(gram))
    shown = [{"answers": [answers[i].name, answers[j].name], "words": gram} for (i, j), gram in pairs.items()]
    return {"pairs": len(pairs), "first": shown[:SHOWN]}


def bag_of_words(answers: list[Answer], folds: int = 10) -> dict[str, Any] | None:
    """Accuracy of a logistic regression on word counts that names the stance of answers to prompts it has not seen, and
    the words that weigh most for each stance. None without scikit-learn, or with fewer than two stances or prompts.

    Chance is the largest stance's share. A corpus whose stances are told by their vocabulary alone teaches vocabulary.
    Words of one answer only are left out; the first 500 prompts are used.
    """
    try:
        from sklearn.feature_extraction import DictVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold, cross_val_predict
    except ImportError:
        return None
    prompts = {row: k for k, row in enumerate(dict.fromkeys(a.row.id for a in answers))}
    used = [a for a in answers if prompts[a.row.id] < WORDS_PROMPTS]
    stances = np.array([a.candidate.stance for a in used])
    groups = np.array([prompts[a.row.id] for a in used])
    kept = min(folds, len(set(groups.tolist())))
    if len(set(stances.tolist())) < 2 or kept < 2:
        return None
    vectors = DictVectorizer()
    often = Counter(word for a in used for word in set(a.words))
    counts = vectors.fit_transform([Counter(w for w in a.words if often[w] > 1) for a in used])
    counts.data = np.log1p(counts.data)
    model = LogisticRegression(max_iter=1000, tol=1e-3)
    try:
        guessed = np.asarray(cross_val_predict(model, counts, stances, groups=groups, cv=GroupKFold(kept)))
    except ValueError:  # no word occurs twice, or a fold holds one stance only
        return None
    model.fit(counts, stances)
    return {
        "accuracy": _number(np.mean(guessed == stances)),
        "chance": _number(max(Counter(stances.tolist()).values()) / len(used)),
        "folds": kept,
        "telling_words": _telling(model, vectors.get_feature_names_out()),
    }


def _telling(model: Any, vocabulary: np.ndarray, top: int = 12) -> dict[str, list[str]]:
    weights = model.coef_ if len(model.classes_) > 2 else np.concatenate([-model.coef_, model.coef_])
    return {
        str(stance): vocabulary[np.argsort(-row)[:top]].tolist()
        for stance, row in zip(model.classes_, weights, strict=True)
    }


def _stance(answers: list[Answer], scale: Scale) -> dict[str, Any]:
    lengths = [len(a.candidate.content.split()) for a in answers]
    grams = [g for a in answers for g in zip(a.words, a.words[1:], a.words[2:], strict=False)]
    seen = profile([a.candidate.ratings for a in answers], scale)
    variance = np.diag(seen.covariance)
    return {
        "answers": len(answers),
        "words": {"mean": _number(sum(lengths) / len(lengths)), "min": min(lengths), "max": max(lengths)},
        "distinct_3": _number(len(set(grams)) / len(grams)) if grams else None,
        "rated": max(seen.count.values(), default=0),
        "mean": {d: _number(seen.mean[d]) for d in seen.dimensions},
        "variance": {d: _number(v) for d, v in zip(seen.dimensions, variance, strict=True)},
        "pinned_low": list(seen.pinned_low),
    }


def _length(answers: list[Answer]) -> float:
    """Mean words of an answer."""
    return sum(len(a.candidate.content.split()) for a in answers) / len(answers) if answers else math.nan


def _domains(corpus: Corpus) -> dict[str, dict[str, int]]:
    """Rows of every domain, in all and by split."""
    splits = {
        domain: [r.split for r in corpus.rows if r.domain == domain] for domain in {r.domain for r in corpus.rows}
    }
    return {domain: {"rows": len(found), **_counts(found)} for domain, found in sorted(splits.items())}


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _repeated(values: Any) -> int:
    return sum(n - 1 for n in Counter(values).values())


def _texts(corpus: Corpus) -> list[str]:
    return [part.content for row in corpus.rows for part in (*row.prompt, *row.candidates)]


def _controls(text: str) -> bool:
    return any(unicodedata.category(c) == "Cc" and c not in "\n\r\t" for c in text)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


__all__ = ["bag_of_words", "check", "overlap", "shared_ngrams", "words"]
