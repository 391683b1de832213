"""Probes as a reader: linear heads on the frozen reference's residuals, in the forward pass that the habit needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.directions.probes import ProbeBank, fit_bank
from aif.errors import BadInput
from aif.objectives import Context
from aif.readers import Reader, Reading
from aif.slots import response_means
from aif.types import Batch


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    members: int = Field(default=8, ge=1, description="heads per dimension, each fitted on a resample of prompts")
    folds: int = Field(default=5, ge=2, description="of the cross-validation, grouped by prompt")
    layers: list[int] | None = Field(default=None, description="layers to choose from; every third when left out")
    penalties: list[float] = Field(
        default=[10.0, 100.0, 1000.0], min_length=1, description="L2 penalties to choose from"
    )
    smoothing: float = Field(default=0.5, gt=0, description="counts added to every cell of the confusion")
    seed: int = 0


def probes(bank: ProbeBank) -> Reader:
    """Q(s | x, y) as the mean of the bank's members; they are kept for the parameter information gain."""
    values = {name: getattr(bank, name) for name in ("weights", "bias", "usable", "A", "pA")}
    return Reader(Partial(_read, **values, layer=jnp.int32(bank.layer)), watch=response_means, name="probes")


def make(options: Options, context: Context) -> Reader:
    """From a config: fitted on the reference's activations of the training candidates.

    Raises:
      BadInput: there are no activations to fit on, or nothing is rated.
    """
    if not (context.ratings >= 0).any():
        raise BadInput("corpus: the reader `probes` needs rated rows and this corpus has none; rate the candidates")
    bank = fit_bank(context.rated(), context.dimensions, len(context.levels), **options.model_dump())
    return probes(bank)


def _read(
    taps: Array, batch: Batch, *, weights: Array, bias: Array, usable: Array, A: Array, pA: Array, layer: Array
) -> Reading:
    means = jnp.take(taps, layer, axis=0)  # [B, R, D]
    members = jax.nn.softmax(jnp.einsum("brd,esdo->ebrso", means, weights) + bias[:, None, None], axis=-1)
    known = (batch.ids >= 0)[..., None] * usable
    return Reading(members.mean(axis=0), known.astype(jnp.float32), A, pA, members)
