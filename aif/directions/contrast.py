"""Contrast directions: the mean difference between responses of two classes, per layer."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from aif.directions.activations import Activations
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
    if positive.all() or not positive.any():
        raise BadInput("direction: one of the two classes has no response; check corpus.target and the stances")
    if not np.isfinite(activations.means).all():
        raise BadInput("direction: an activation is not finite; check the model's weights and the compute dtype")
    weights = activations.tokens.astype(np.float64) if pooling == "token" else np.ones(len(positive))
    mean = lambda on: np.average(activations.means[on], axis=0, weights=weights[on])  # noqa: E731
    vector = (mean(positive) - mean(~positive)).astype(np.float32)
    about = {
        "pooling": pooling,
        "sign": "positive minus negative",
        "norm_unit": "raw",
        "norms": activations.norms.tolist(),
    }
    return Direction(jnp.asarray(vector), "contrast", {**about, **(provenance or {})})


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
    if not 0 <= layer < L:
        raise BadInput(f"direction: layer {layer} is out of range; the model has layers 0..{L - 1}")
    only: Float[Array, "L"] = jnp.zeros(L).at[layer].set(1.0)
    return {"vector": {"u": direction.vector * only[:, None], "scale": only}}
