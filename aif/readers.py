"""State readers: from a response to beliefs over its orientation, one factor per scale dimension.

    Q(s_d | x, y),  d = 1..S,  each a distribution over the levels of the scale

and the likelihood A_d = P(observed level | state) with its Dirichlet counts. A reader is a function from a batch to
`Reading`; adding one means adding a function here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float, Int

from aif.errors import BadInput
from aif.policy import Policy
from aif.types import Batch


class Reading(NamedTuple):
    """Beliefs `states [B, R, S, O]`, known `[B, R, S]` (0 where the reader has nothing to say), likelihood
    `A [S, O, O]` (outcome by state) and its counts `pA` of the same shape."""

    states: Float[Array, "B R S O"]
    known: Float[Array, "B R S"]
    A: Float[Array, "S O O"]
    pA: Float[Array, "S O O"]


Reader = Callable[[Policy, Batch], Reading]


def reliability(levels: int, agreement: float) -> Float[Array, "O O"]:
    """Confusion of a rater who gives the true level with probability `agreement` and otherwise errs to a neighbouring
    level; columns (states) sum to one.

    Raises:
      BadInput: fewer than two levels.
    """
    if levels < 2:
        raise BadInput(f"scale: {levels} level leaves nothing to read; a scale has two levels or more")
    steps = np.abs(np.subtract.outer(np.arange(levels), np.arange(levels)))
    near = (steps == 1).astype(float)
    return jnp.array(agreement * np.eye(levels) + (1 - agreement) * near / near.sum(axis=0), jnp.float32)


def ratings(dimensions: int, levels: int, *, agreement: float = 0.8, strength: float = 16.0) -> Reader:
    """The corpus's own ratings, softened by how far raters can be trusted:

        Q(s | o) proportional to P(o | s), uniform prior over states

    Args:
      agreement: diagonal of the reliability matrix A.
      strength: Dirichlet counts per state behind A; more counts, less to learn about A.
    """
    A = jnp.broadcast_to(reliability(levels, agreement), (dimensions, levels, levels))
    return Partial(_read_ratings, A=A, pA=strength * A)


def _read_ratings(policy: Policy, batch: Batch, *, A: Array, pA: Array) -> Reading:
    levels_seen: Int[Array, "B R S"] = batch.extras["ratings"]
    known = (levels_seen >= 0) & (batch.ids >= 0)[..., None]
    posterior = A / A.sum(axis=2, keepdims=True)  # [S, O observed, O states]: Q(s | o)
    states = posterior[jnp.arange(A.shape[0]), jnp.maximum(levels_seen, 0)]
    return Reading(states, known.astype(jnp.float32), A, pA)


def empirical_preferences(levels_seen: np.ndarray, levels: int, smoothing: float = 1.0) -> Float[Array, "S O"]:
    """ln P(o_d | C) from the ratings `[responses, S]` of preferred responses, with `smoothing` counts per level."""
    counts = np.stack([(levels_seen == o).sum(axis=0) for o in range(levels)], axis=-1) + smoothing
    return jnp.log(jnp.array(counts / counts.sum(axis=-1, keepdims=True), jnp.float32))


def normalise_preferences(C: Float[Array, "S O"]) -> Float[Array, "S O"]:
    """Log-preferences shifted so that each dimension's probabilities sum to one."""
    return C - jax.nn.logsumexp(C, axis=-1, keepdims=True)
