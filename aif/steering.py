"""Edits of the residual stream: add along a direction, project it out, clamp its coordinate; for which tokens.

Doses are in residual norms: dose 1 at layer l adds a vector as long as the mean residual there, `norms[l]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from aif.errors import BadInput
from aif.slots import owners
from aif.types import Batch, Edits

Scope = Literal["prompt", "response", "all"]


def _parts(direction: Float[Array, "L D"], layers: Sequence[int], rows: int) -> tuple[Array, Array]:
    """(unit vectors [L, 1, D], which layers [L, B, 1])."""
    L = direction.shape[0]
    wrong = [l for l in layers if not 0 <= l < L]
    if wrong:
        raise BadInput(f"steer: layer {wrong[0]} is out of range; the model has layers 0..{L - 1}")
    length = jnp.linalg.norm(direction, axis=-1, keepdims=True)
    unit = direction / jnp.where(length > 0, length, 1.0)
    on = jnp.zeros((L, rows, 1)).at[jnp.array(layers)].set(1.0)
    return unit[:, None, :], on


def add(
    direction: Float[Array, "L D"], doses: Float[Array, "B"], norms: Float[Array, "L"], *, layers: Sequence[int]
) -> Edits:
    """h <- h + dose_b norms_l vhat_l at the chosen layers; row b has its own dose."""
    unit, on = _parts(direction, layers, len(doses))
    push = on * jnp.asarray(doses)[None, :, None] * norms[:, None, None]
    return Edits(unit, push, jnp.zeros_like(on), jnp.zeros_like(on), jnp.ones((len(doses), 1)))


def clamp(
    direction: Float[Array, "L D"], values: Float[Array, "B"], norms: Float[Array, "L"], *, layers: Sequence[int]
) -> Edits:
    """h <- h + (value_b norms_l - h . vhat_l) vhat_l: the coordinate along the direction is set."""
    unit, on = _parts(direction, layers, len(values))
    goal = on * jnp.asarray(values)[None, :, None] * norms[:, None, None]
    return Edits(unit, jnp.zeros_like(on), on, goal, jnp.ones((len(values), 1)))


def project_out(direction: Float[Array, "L D"], *, rows: int, layers: Sequence[int]) -> Edits:
    """h <- h - (h . vhat_l) vhat_l: ablation of the direction."""
    zeros = jnp.zeros(rows)
    return clamp(direction, zeros, jnp.ones(direction.shape[0]), layers=layers)


def within(edits: Edits, batch: Batch, scope: Scope = "all") -> Edits:
    """The edits on the tokens of a packed batch that `scope` names; never on padding."""
    real = batch.segments > 0
    answered = owners(batch) < batch.ids.shape[1]
    chosen = {"all": real, "prompt": real & ~answered, "response": answered}[scope]
    return edits._replace(mask=jnp.asarray(chosen, jnp.float32))
