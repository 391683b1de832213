"""The probe bank: an ensemble of linear heads per scale dimension on mean residuals of responses, at one layer.

Layer and penalty are chosen by cross-validation grouped by prompt, as the pair with the largest held-out log-likelihood
summed over dimensions. The held-out confusion of the chosen pair gives the likelihood A and its counts pA. Members are
fitted on bootstrap resamples of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from aif.checkpoint import load_arrays, save_arrays
from aif.corpus.ratings import quadratic_kappa
from aif.directions.logistic import fit
from aif.errors import BadInput

BINS = 10


class Rated(NamedTuple):
    """Mean residuals of rated responses `[N, L, D]`, their levels `[N, S]` (-1 where unrated), their prompts `[N]`, and
    whether they are the target of theirs `[N]`."""

    means: np.ndarray
    levels: np.ndarray
    prompts: np.ndarray
    liked: np.ndarray = np.zeros(0, bool)


@dataclass(frozen=True)
class ProbeBank:
    """Heads on the residual after `layer`: ln Q_e(s_d) = softmax(h . weights[e, d] + bias[e, d]).

    `usable` is 0 for a dimension that the training data show one level of; `report` holds a line per dimension.
    """

    layer: int
    weights: Float[Array, "E S D O"]
    bias: Float[Array, "E S O"]
    usable: Float[Array, "S"]
    A: Float[Array, "S O O"]
    pA: Float[Array, "S O O"]
    report: list[dict[str, Any]]


class Basis(NamedTuple):
    """Standardised training features in principal coordinates: z = (x - mean) / scale @ axes."""

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray

    def of(self, x: np.ndarray) -> np.ndarray:
        return ((x - self.mean) / self.scale) @ self.axes


def basis_of(x: np.ndarray) -> Basis:
    """All directions in which the rows of x differ: a penalised linear fit on them is the fit on x itself.

    They are the eigenvectors of the smaller Gram matrix, in float64: several times cheaper than a decomposition of x.
    On one thread: BLAS threads that wait by spinning make this size a hundred times slower beside a busy process.
    """
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    z = np.asarray((x - mean) / scale, np.float64)
    tall = z.shape[0] > z.shape[1]
    with threadpool_limits(limits=1, user_api="blas"):
        squared, vectors = np.linalg.eigh(z.T @ z if tall else z @ z.T)
    kept = squared > 1e-10 * squared[-1]
    squared, vectors = squared[kept][::-1], vectors[:, kept][:, ::-1]
    return Basis(mean, scale, vectors if tall else z.T @ (vectors / np.sqrt(squared)))


def folds_of(prompts: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold per response; all responses to a prompt share theirs.

    Raises:
      BadInput: fewer prompts than folds.
    """
    names, number = np.unique(prompts, return_inverse=True)
    if len(names) < folds:
        raise BadInput(
            f"probes: {len(names)} prompts cannot make {folds} folds; rate more prompts or ask for fewer folds"
        )
    return np.random.default_rng(seed).permutation(len(names))[number] % folds


def held_out(
    x: np.ndarray, y: np.ndarray, fold: np.ndarray, penalties: Sequence[float], levels: int
) -> Float[np.ndarray, "C N S O"]:
    """Probabilities of every response from heads fitted on the other folds, for each of C penalties."""
    C, S = len(penalties), y.shape[1]
    out = np.zeros((C, *y.shape, levels))
    most = len(x) - int(np.bincount(fold).min())
    each = np.repeat(np.asarray(penalties, np.float32), S)
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        basis = basis_of(x[train])
        z, w = padded(basis.of(x[train]), np.tile(y[train], (1, C)), most)
        B, b = fit(z, *w, each, levels=levels)
        scores = jnp.einsum("nr,rpo->pno", basis.of(x[test]), B[: basis.axes.shape[1]]) + b[:, None]
        p = np.asarray(jax.nn.softmax(scores, axis=-1)).reshape(C, S, -1, levels)
        out[:, test] = p.transpose(0, 2, 1, 3)
    return out


def padded(z: np.ndarray, y: np.ndarray, n: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Features `[n, n]`, labels and weights `[n, S]`, so that folds of any size share one compilation."""
    wide = np.zeros((n, n), np.float32)
    wide[: z.shape[0], : z.shape[1]] = z
    labels = np.full((n, y.shape[1]), -1, np.int32)
    labels[: len(y)] = y
    return wide, (labels, np.ones(labels.shape, np.float32))


def log_likelihood(p: np.ndarray, y: np.ndarray) -> float:
    """Sum of ln p of the given levels, unrated ones left out."""
    known = y >= 0
    return float(np.log(np.maximum(np.take_along_axis(p, np.maximum(y, 0)[..., None], -1)[..., 0][known], 1e-12)).sum())


def fit_bank(
    data: Rated,
    dimensions: Sequence[str],
    levels: int,
    *,
    layers: Sequence[int] | None = None,
    penalties: Sequence[float] = (10.0, 100.0, 1000.0),
    members: int = 8,
    folds: int = 5,
    smoothing: float = 0.5,
    seed: int = 0,
) -> ProbeBank:
    """Choose layer and penalty, fit the members, and report.

    Raises:
      BadInput: nothing is rated, an activation is not finite, a layer does not exist, or prompts are too few.
    """
    L = data.means.shape[1]
    layers = list(range(2, L, 3)) or [L - 1] if layers is None else list(layers)
    _check(data, layers)
    fold = folds_of(data.prompts, folds, seed)
    trials = {}
    for layer in layers:
        p = held_out(data.means[:, layer], data.levels, fold, penalties, levels)
        trials |= {(layer, penalty): p[c] for c, penalty in enumerate(penalties)}
    layer, penalty = max(trials, key=lambda k: log_likelihood(trials[k], data.levels))
    p = trials[layer, penalty]
    counts = confusion(p, data.levels) + smoothing
    rng = np.random.default_rng([seed, 1])
    weights, bias = _members(data, layer, penalty, levels, members, rng)
    shuffled = held_out(data.means[:, layer], rng.permutation(data.levels), fold, [penalty], levels)[0]
    report = [
        {"dimension": name, "layer": layer, "penalty": penalty, **score(p[:, d], data.levels[:, d])}
        | {"shuffled": score(shuffled[:, d], data.levels[:, d])["accuracy"]}
        for d, name in enumerate(dimensions)
    ]
    usable = np.array([len(np.unique(y[y >= 0])) > 1 for y in data.levels.T], np.float32)
    A = counts / counts.sum(axis=1, keepdims=True)
    found = {"weights": weights, "bias": bias, "usable": usable, "A": A, "pA": counts}
    return ProbeBank(layer, **{k: jnp.asarray(v, jnp.float32) for k, v in found.items()}, report=report)


def _check(data: Rated, layers: Sequence[int]) -> None:
    if not (data.levels >= 0).any():
        raise BadInput("probes: no response of the corpus is rated; rate the candidates")
    if not np.isfinite(data.means).all():
        raise BadInput("probes: an activation is not finite; check the model's weights and the compute dtype")
    wrong = [l for l in layers if not 0 <= l < data.means.shape[1]]
    if wrong:
        raise BadInput(f"probes: layer {wrong[0]} is out of range; the model has layers 0..{data.means.shape[1] - 1}")


def _members(
    data: Rated, layer: int, penalty: float, levels: int, members: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Heads `[E, S, D, O]` and biases on raw residuals, each member on a resample of prompts."""
    x, S = data.means[:, layer], data.levels.shape[1]
    names, number = np.unique(data.prompts, return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=members)[:, number]  # [E, N]
    basis = basis_of(x)
    z, y = basis.of(x).astype(np.float32), np.tile(data.levels.astype(np.int32), (1, members))
    w = np.repeat(drawn.T.astype(np.float32), S, axis=1)
    B, b = (np.asarray(v, np.float64) for v in fit(z, y, w, penalty, levels=levels))
    raw = np.einsum("dr,rpo->pdo", basis.axes / basis.scale[:, None], B)
    bias = b - np.einsum("d,pdo->po", basis.mean, raw)
    return raw.reshape(members, S, -1, levels), bias.reshape(members, S, levels)


def confusion(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Counts `[S, O read, O true]` of held-out readings."""
    S, O = p.shape[1:]
    counts = np.zeros((S, O, O))
    read = p.argmax(axis=-1)
    for d in range(S):
        known = y[:, d] >= 0
        np.add.at(counts[d], (read[known, d], y[known, d]), 1)
    return counts


def score(p: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Accuracy, chance, majority share, quadratic kappa and expected calibration error of one dimension."""
    p, y = p[y >= 0], y[y >= 0]
    levels = p.shape[1]
    if not len(y):
        return {"n": 0, "accuracy": None, "chance": 1 / levels, "majority": None, "kappa": None, "ece": None}
    read = p.argmax(axis=1)
    kappa = quadratic_kappa(read.tolist(), y.tolist(), levels)
    return {
        "n": len(y),
        "accuracy": float((read == y).mean()),
        "chance": 1 / levels,
        "majority": float(np.bincount(y, minlength=levels).max() / len(y)),
        "kappa": None if np.isnan(kappa) else kappa,
        "ece": calibration_error(p.max(axis=1), read == y),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """sum_b |B_b| / n |accuracy - mean confidence| over ten equal bins of confidence (Guo et al. 2017, eq. 3)."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((right[place == b] - confidence[place == b]).sum()) for b in range(BINS)]
    return float(sum(gaps) / len(right))


def save_bank(bank: ProbeBank, path: Path, about: dict[str, Any]) -> None:
    """One safetensors file; `about` says what it was fitted on (weights, dimensions, data)."""
    names = ("weights", "bias", "usable", "A", "pA")
    arrays = {name: getattr(bank, name) for name in names}
    save_arrays(path, arrays, {**about, "layer": bank.layer, "report": bank.report})


def load_bank(path: Path, expected: dict[str, Any]) -> ProbeBank:
    """Read a bank, refusing one fitted on something else.

    Raises:
      BadInput: unreadable, or `expected` (weights, dimensions, ...) differs from what it was fitted on.
    """
    arrays, about = load_arrays(path)
    for name, value in expected.items():
        if about.get(name) != value:
            raise BadInput(
                f"{path}: fitted on another {name} ({about.get(name)}) than this one ({value}); fit it again"
            )
    return ProbeBank(about["layer"], **{k: jnp.asarray(v) for k, v in arrays.items()}, report=about["report"])
