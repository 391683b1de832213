"""Linear probes of two classes, many label sets over the same features at once: logistic, ridge and LDA.

Each gives weights w and a bias b; h . w + b > 0 reads the positive class. Features are standardised and turned to
principal coordinates first, in which all three are small and well conditioned; w and b are given back on raw features.

    logistic   minimise  sum_i m_i ln(1 + exp(-y_i f_i)) + strength / 2 ||w||^2,    f = z . w + b
    ridge      minimise  sum_i m_i (y_i - f_i)^2 + strength ||w||^2
    lda        w = S^-1 (mean+ - mean-),  S = (1 - strength) cov + strength tr(cov) / D I within classes

They are scikit-learn's LogisticRegression(C=1/strength), Ridge(alpha=strength) and
LinearDiscriminantAnalysis(solver="lsqr", shrinkage=strength) on standardised features. y is +1 or -1, m a weight.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from aif.directions.logistic import fit
from aif.directions.probes import basis_of
from aif.errors import BadInput

STRENGTHS = {"logistic": 100.0, "ridge": 100.0, "lda": 0.5}


def fit_linear(
    x: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N P"],
    weights: Float[np.ndarray, "N P"],
    *,
    method: str,
    strength: float,
) -> tuple[Float[np.ndarray, "D P"], Float[np.ndarray, "P"]]:
    """Weights and biases of P probes of the rows of x; labels are 0 or 1, a weight of 0 leaves a row out.

    Raises:
      BadInput: there is no such method, or its strength is out of range.
    """
    if method not in STRENGTHS:
        raise BadInput(f"probe: no method is called {method!r}; there are {', '.join(STRENGTHS)}")
    if strength < 0 or not np.isfinite(strength) or (method == "lda" and strength > 1):
        raise BadInput(f"probe: strength {strength:g} is out of range for {method}; " + _RANGES[method])
    basis = basis_of(x)
    z = basis.of(x)
    coefficients, bias = _METHODS[method](z, labels, weights, strength, x.shape[1])
    raw = (basis.axes @ coefficients) / basis.scale[:, None]
    return raw, bias - basis.mean @ raw


def _logistic(z: np.ndarray, y: np.ndarray, m: np.ndarray, strength: float, D: int) -> tuple[np.ndarray, np.ndarray]:
    """The two columns of the softmax differ by w and share its penalty, so it gets twice the strength."""
    wide = np.zeros((len(z), min(len(z), D)), np.float32)  # one shape, and one compilation, for all layers
    wide[:, : z.shape[1]] = z
    B, b = fit(wide, y.astype(np.int32), m.astype(np.float32), 2 * strength, levels=2)
    B, b = np.asarray(B, np.float64)[: z.shape[1]], np.asarray(b, np.float64)
    return B[..., 1] - B[..., 0], b[:, 1] - b[:, 0]


def _ridge(z: np.ndarray, y: np.ndarray, m: np.ndarray, strength: float, D: int) -> tuple[np.ndarray, np.ndarray]:
    def one(y: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, float]:
        share, sign = m / m.sum(), 2.0 * y - 1
        at, height = share @ z, share @ sign
        centred = z - at
        gram = (centred * m[:, None]).T @ centred + max(strength, 1e-10) * np.eye(z.shape[1])
        w = np.linalg.solve(gram, (centred * m[:, None]).T @ (sign - height))
        return w, height - at @ w

    return _columns([one(*pair) for pair in zip(y.T, m.T, strict=True)])


def _lda(z: np.ndarray, y: np.ndarray, m: np.ndarray, strength: float, D: int) -> tuple[np.ndarray, np.ndarray]:
    def one(y: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, float]:
        share = m / m.sum()
        prior = np.array([share[y == k].sum() for k in (0, 1)])
        centre = np.stack([share[y == k] @ z[y == k] / prior[k] for k in (0, 1)])
        off = z - centre[y]
        spread = (off * share[:, None]).T @ off
        shrunk = (1 - strength) * spread + (strength + 1e-12) * np.trace(spread) / D * np.eye(z.shape[1])
        w = np.linalg.solve(shrunk, centre[1] - centre[0])
        return w, np.log(prior[1] / prior[0]) - centre.mean(axis=0) @ w

    return _columns([one(*pair) for pair in zip(y.T, m.T, strict=True)])


def _columns(found: list[tuple[np.ndarray, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([w for w, _ in found], axis=1), np.array([b for _, b in found])


_METHODS = {"logistic": _logistic, "ridge": _ridge, "lda": _lda}
_RANGES = {"logistic": "give 0 or more", "ridge": "give 0 or more", "lda": "give 0 to 1"}
