"""The corpus's own ratings as a reader, softened by how far raters can be trusted."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float, Int
from pydantic import BaseModel, Field

from aif.errors import BadInput
from aif.objectives import Context
from aif.readers import Reader, Reading
from aif.types import Batch


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    agreement: float = Field(default=0.8, gt=0, le=1, description="chance that a rating names the true level")
    strength: float = Field(default=16.0, gt=0, description="Dirichlet counts per state behind the reliability matrix")


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
    """Q(s | o) proportional to P(o | s), uniform prior over states.

    Args:
      agreement: diagonal of the reliability matrix A.
      strength: Dirichlet counts per state behind A; more counts, less to learn about A.
    """
    A = jnp.broadcast_to(reliability(levels, agreement), (dimensions, levels, levels))
    return Reader(Partial(_read, A=A, pA=strength * A), name="ratings")


def make(options: Options, context: Context) -> Reader:
    """From a config.

    Raises:
      BadInput: no row of the corpus has ratings.
    """
    if not (context.ratings >= 0).any():
        raise BadInput("corpus: the reader `ratings` needs rated rows and this corpus has none; rate the candidates")
    return ratings(len(context.dimensions), len(context.levels), **options.model_dump())


def _read(taps: Any, batch: Batch, *, A: Array, pA: Array) -> Reading:
    levels_seen: Int[Array, "B R S"] = batch.extras["ratings"]
    known = (levels_seen >= 0) & (batch.ids >= 0)[..., None]
    posterior = A / A.sum(axis=2, keepdims=True)  # [S, O observed, O states]: Q(s | o)
    states = posterior[jnp.arange(A.shape[0]), jnp.maximum(levels_seen, 0)]
    return Reading(states, known.astype(jnp.float32), A, pA)
