"""Contrast directions: how responses of two classes differ, per layer."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.directions.activations import Activations, check_classes
from aif.directions.record import check_layer
from aif.errors import BadInput
from aif.types import Adapter, Direction


def mean_difference(
    activations: Activations,
    positive: Bool[np.ndarray, "N"],
    *,
    pooling: Literal["response", "token"] = "response",
    provenance: dict[str, Any] | None = None,
) -> Direction:
    """v_l = mean(positive) - mean(negative) over responses, or over all their tokens (`pooling="token"`).

    Token pooling lets long responses weigh more, as in Turner, Soligo et al. 2025 (Convergent linear representations,
    section 3.1); response pooling gives each response one vote.

    Raises:
      BadInput: a class is empty, or an activation is not finite.
    """
    check_classes(activations, positive)
    weights = activations.tokens.astype(np.float64) if pooling == "token" else np.ones(len(positive))
    mean = lambda on: np.average(activations.means[on], axis=0, weights=weights[on])  # noqa: E731
    vector = (mean(positive) - mean(~positive)).astype(np.float32)
    about = {
        "method": "mean difference",
        "pooling": pooling,
        "sign": "positive minus negative",
        "norm_unit": "raw",
        "norms": activations.norms.tolist(),
    }
    return Direction(jnp.asarray(vector), "contrast", {**about, **(provenance or {})})


def pairs_of(positive: Bool[np.ndarray, "N"], prompts: Int[np.ndarray, "N"]) -> Int[np.ndarray, "P 2"]:
    """(positive, negative) of every two responses of different class to one prompt.

    Raises:
      BadInput: no prompt has a response of each class.
    """
    found = [
        (i, j)
        for prompt in np.unique(prompts)
        for i in np.flatnonzero((prompts == prompt) & positive)
        for j in np.flatnonzero((prompts == prompt) & ~positive)
    ]
    if not found:
        raise BadInput("direction: no prompt has a response of each class to pair; use the mean difference")
    return np.array(found)


def paired_pca(
    activations: Activations,
    positive: Bool[np.ndarray, "N"],
    prompts: Int[np.ndarray, "N"],
    *,
    provenance: dict[str, Any] | None = None,
) -> Direction:
    """v_l = s_1 / sqrt(P) u_1, u_1 the first right singular vector of the P paired differences h+ - h-.

    The differences are not centred: centring takes out their mean, which is the contrast. This is the first component
    of both members of each pair about their midpoint (`pca_center` in repeng); s_1 / sqrt(P) is the root mean square
    of the differences along u_1, and u_1 points the way of most of them: one outlying pair may turn their mean.

    Raises:
      BadInput: a class is empty, no prompt has both classes, or an activation is not finite.
    """
    check_classes(activations, positive)
    pairs = pairs_of(positive, prompts)
    gaps = (activations.means[pairs[:, 0]] - activations.means[pairs[:, 1]]).transpose(1, 0, 2).astype(np.float64)
    _, size, axes = np.linalg.svd(gaps, full_matrices=False)
    first = axes[:, 0]
    along = np.einsum("lpd,ld->lp", gaps, first)
    votes = np.sign(along).sum(axis=1)
    way = np.where(votes == 0, np.sign(along.sum(axis=1)), np.sign(votes))
    vector = first * (np.where(way == 0, 1.0, way) * size[:, 0] / np.sqrt(len(pairs)))[:, None]
    about = {
        "method": "paired PCA",
        "pairs": len(pairs),
        "explained": (np.square(size[:, 0]) / np.maximum(np.square(size).sum(axis=1), 1e-30)).tolist(),
        "sign": "along positive minus negative of most pairs",
        "norm_unit": "raw",
        "norms": activations.norms.tolist(),
    }
    return Direction(jnp.asarray(vector, jnp.float32), "contrast", {**about, **(provenance or {})})


def random_direction(direction: Direction, key: Array) -> Direction:
    """Gaussian direction with the same norm at every layer: the control."""
    drawn = jax.random.normal(key, direction.vector.shape)
    length = jnp.linalg.norm(direction.vector, axis=-1, keepdims=True)
    return Direction(
        drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True) * length, "random", {"norms_of": direction.kind}
    )


def as_adapter(direction: Direction, layer: int) -> Adapter:
    """The direction at one layer as a vector adapter: h <- h + v at that layer's output, all tokens."""
    L = direction.vector.shape[0]
    only: Float[Array, "L"] = jnp.zeros(L).at[check_layer(layer, L)].set(1.0)
    return {"vector": {"u": direction.vector * only[:, None], "scale": only}}
