"""What is linearly readable at each layer: probes with held-out accuracy, a random-label control and split halves.

Folds are grouped by prompt, so no probe is tested on a prompt it has seen. The control is the same fit on labels that
were shuffled within each prompt; accuracy minus control accuracy is the probe's *selectivity* (Hewitt & Liang 2019).
Standardising and turning the features uses all rows and no label.
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

    `accuracy` is on held-out prompts; `control` is that of shuffled labels; `split_half` is the cosine between probes
    fitted on two halves of the prompts.
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
    shuffled = shuffled_within(positive, prompts, seed)
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


def shuffled_within(positive: np.ndarray, prompts: np.ndarray, seed: int) -> np.ndarray:
    """Labels shuffled among the responses to each prompt: the random-label control keeps every prompt's balance."""
    generator, out = np.random.default_rng([seed, 7]), positive.copy()
    for prompt in np.unique(prompts):
        at = np.flatnonzero(prompts == prompt)
        out[at] = positive[generator.permutation(at)]
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
    return table.astype(int), weights.astype(np.float64)


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
    right = np.stack([(held > 0) == positive, (control > 0) == shuffled], axis=1).astype(float)
    _, prompt = np.unique(prompts, return_inverse=True)
    sums, sizes = (np.zeros((prompt.max() + 1, 2)), np.bincount(prompt).astype(float))
    np.add.at(sums, prompt, right)
    drawn = draws(len(sizes), RESAMPLES, 0)
    accuracy = (drawn @ sums) / (drawn @ sizes)[:, None]
    (low, high), gap = bounds(accuracy[:, 0]), bounds(accuracy[:, 0] - accuracy[:, 1])
    mean = right.mean(axis=0)
    one, two = units(halves.T)
    return Readable(
        layer,
        *map(float, (mean[0], low, high, auroc(held, positive), mean[1], mean[0] - mean[1], *gap, one @ two)),
    )


def auroc(score: Float[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]) -> float:
    """Probability that a positive scores above a negative; ties count half (Mann-Whitney U / n+ n-)."""
    n = int(positive.sum())
    u = rankdata(score)[positive].sum() - n * (n + 1) / 2
    return float(u / (n * (len(positive) - n)))
