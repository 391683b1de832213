"""What is linearly readable at each layer: probes with held-out accuracy, a random-label control and split halves.

Folds are grouped by prompt, so no probe is tested on a prompt it has seen. The control is the same fit on shuffled
labels that keep the balance within prompts; accuracy minus control accuracy is the *selectivity* (Hewitt & Liang 2019).
Both classes weigh the same in every fit, and accuracy is the mean of that of either class: chance is 1/2 however rare
one of them is. Standardising and turning the features uses all rows and no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from aif.directions.activations import Activations, check_classes
from aif.directions.linear import STRENGTHS, fit_linear
from aif.directions.probes import folds_of
from aif.directions.record import check_layer, units
from aif.errors import BadInput
from aif.statistics import bounds, draws
from aif.types import Direction

RESAMPLES = 2000


class Readable(NamedTuple):
    """What a probe reads at one layer; intervals are 95 % bootstrap over prompts.

    `accuracy` is on held-out prompts, mean of both classes; `control` is that of shuffled labels; `split_half` is the
    cosine between probes fitted on two halves of the prompts.
    """

    layer: int
    accuracy: float
    low: float
    high: float
    auroc: float
    control: float
    selectivity: float
    selectivity_low: float
    selectivity_high: float
    split_half: float


def probe(
    activations: Activations,
    positive: Bool[np.ndarray, "N"],
    prompts: Int[np.ndarray, "N"],
    *,
    method: str = "logistic",
    strength: float | None = None,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> tuple[Direction, list[Readable]]:
    """A probe per layer, fitted on all responses, and what its held-out twins read.

    The direction's vector is the probe's weights on raw residuals, `bias` its biases: h . v_l + bias_l > 0 reads
    positive. Its layer is the one with the best held-out accuracy. Layers that were not asked for are zero.

    Raises:
      BadInput: a class is empty, a layer does not exist, an activation is not finite, or prompts are too few.
    """
    check_classes(activations, positive)
    L, D = activations.means.shape[1:]
    chosen = [check_layer(l, L, "probe") for l in (range(L) if layers is None else layers)]
    fold, half = folds_of(prompts, folds, seed), folds_of(prompts, 2, seed + 1)
    shuffled = shuffled_labels(positive, prompts, seed)
    labels, weights = _problems(positive, shuffled, fold, half)
    strength = STRENGTHS.get(method, 0.0) if strength is None else strength
    vector, bias, found = np.zeros((L, D)), np.zeros(L), []
    for layer in chosen:
        x = activations.means[:, layer].astype(np.float64)
        w, b = fit_linear(x, labels, weights, method=method, strength=strength)
        scores = x @ w + b
        found.append(_scored(layer, scores, positive, shuffled, fold, prompts, w[:, 1:3]))
        vector[layer], bias[layer] = w[:, 0], b[0]
    best = max(found, key=lambda r: r.accuracy).layer
    about = {
        "method": method,
        "strength": strength,
        "layer": best,
        "bias": bias.tolist(),
        "sign": "positive class higher",
        "norm_unit": "log-odds per unit of residual" if method != "ridge" else "label per unit of residual",
        "norms": activations.norms.tolist(),
        "readable": [r._asdict() for r in found],
    }
    return Direction(jnp.asarray(vector, jnp.float32), "probe", {**about, **(provenance or {})}), found


def shuffled_labels(positive: np.ndarray, prompts: np.ndarray, seed: int) -> np.ndarray:
    """The random-label control: labels shuffled among the responses to each prompt, and then dealt out anew among the
    prompts with as many responses, which keeps the balance within prompts."""
    generator, out = np.random.default_rng([seed, 7]), positive.copy()
    groups = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    for size in {len(group) for group in groups}:
        places = np.stack([group for group in groups if len(group) == size])
        dealt = generator.permuted(positive[places], axis=1)
        out[places] = dealt[generator.permutation(len(dealt))]
    return out


def _problems(
    positive: np.ndarray, shuffled: np.ndarray, fold: np.ndarray, half: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights `[N, P]`: all rows, the two halves, all but each fold, and the same with shuffled labels."""
    parts = [np.ones(len(positive), bool), half == 0, half == 1, *(fold != k for k in range(fold.max() + 1))]
    labels = [positive] * len(parts) + [shuffled] * (len(parts) - 3)
    weights = np.stack(parts + parts[3:], axis=1)
    table = np.stack(labels, axis=1)
    counts = [(weights & (table == side)).sum(axis=0) for side in (True, False)]
    if min(c.min() for c in counts) == 0:
        raise BadInput(
            "probe: a fold or half of the prompts holds one class only; give more prompts or responses of both classes"
        )
    share = np.where(table, *counts) / (counts[0] + counts[1])
    return table.astype(int), weights * 0.5 / share


def _scored(
    layer: int,
    scores: np.ndarray,
    positive: np.ndarray,
    shuffled: np.ndarray,
    fold: np.ndarray,
    prompts: np.ndarray,
    halves: np.ndarray,
) -> Readable:
    K, rows = int(fold.max()) + 1, np.arange(len(fold))
    held, control = scores[rows, 3 + fold], scores[rows, 3 + K + fold]
    truth = np.stack([positive, shuffled], axis=1)
    right = (np.stack([held, control], axis=1) > 0) == truth
    number = np.unique(prompts, return_inverse=True)[1]
    total = lambda x: np.stack([np.bincount(number, weights=column) for column in x.T], axis=1)  # noqa: E731  [G, 2]
    counts = [(total(right & side), total(side)) for side in (truth, ~truth)]
    mean = lambda w: np.mean([w @ hit / np.maximum(w @ n, 1e-9) for hit, n in counts], axis=0)  # noqa: E731
    value, drawn = mean(np.ones(number.max() + 1)), mean(draws(number.max() + 1, RESAMPLES, 0))
    (low, high), gap = bounds(drawn[:, 0]), bounds(drawn[:, 0] - drawn[:, 1])
    one, two = units(halves.T)
    return Readable(
        layer,
        *map(float, (value[0], low, high, auroc(held, positive), value[1], value[0] - value[1], *gap, one @ two)),
    )


def auroc(score: Float[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]) -> float:
    """Probability that a positive scores above a negative; ties count half (Mann-Whitney U / n+ n-)."""
    n = int(positive.sum())
    u = rankdata(score)[positive].sum() - n * (n + 1) / 2
    return float(u / (n * (len(positive) - n)))
