"""Preferences C, the log-probabilities ln P(o | C) that pragmatic value is measured against, per scale dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from pydantic import BaseModel, Field

from aif.errors import BadInput

if TYPE_CHECKING:
    from aif.objectives import Context


def empirical(levels_seen: np.ndarray, levels: int, smoothing: float = 1.0) -> Float[Array, "S O"]:
    """ln P(o_d | C) from the ratings `[responses, S]` of preferred responses, with `smoothing` counts per level."""
    counts = np.stack([(levels_seen == o).sum(axis=0) for o in range(levels)], axis=-1) + smoothing
    return jnp.log(jnp.array(counts / counts.sum(axis=-1, keepdims=True), jnp.float32))


class TierPreference(BaseModel, extra="forbid"):
    """Preferences from the ratings of a tier."""

    tier: Literal["high", "mid", "broad"] = Field(
        description="the rating frequencies of target responses to training prompts of this tier, by `corpus.tiers`"
    )


def tiered(wanted: TierPreference, context: Context, smoothing: float = 1.0) -> Float[Array, "S O"]:
    """ln P(o_d | C) from the target responses whose row is in the tier.

    Raises:
      BadInput: no target response of the tier is rated.
    """
    there = context.ratings[context.liked & (context.tiers() == wanted.tier)]
    if not (there >= 0).any():
        raise BadInput(
            f"preferences.tier: no target response of the {wanted.tier} tier is rated; move the borders of "
            "corpus.tiers, or rate the responses"
        )
    return empirical(there, len(context.levels), smoothing)


def normalise(C: Float[Array, "S O"]) -> Float[Array, "S O"]:
    """Log-preferences shifted so that each dimension's probabilities sum to one."""
    return C - jax.nn.logsumexp(C, axis=-1, keepdims=True)


def configured(table: dict[str, list[float]], context: Context) -> Float[Array, "S O"]:
    """From `{dimension: [a number per level], default: [...]}`; dimensions left out take the default, or none is
    preferred.

    Raises:
      BadInput: a dimension that the scale does not have, or a number of levels that is not its own.
    """
    unknown = [d for d in table if d not in (*context.dimensions, "default")]
    if unknown:
        raise BadInput(
            f"preferences.{unknown[0]}: the scale has no such dimension; it has {', '.join(context.dimensions)}"
        )
    rows = []
    for dimension in context.dimensions:
        row = table.get(dimension, table.get("default", [0.0] * len(context.levels)))
        if len(row) != len(context.levels):
            raise BadInput(
                f"preferences.{dimension}: {len(row)} numbers for the {len(context.levels)} levels; give one each"
            )
        rows.append(row)
    return normalise(jnp.array(rows, jnp.float32))
