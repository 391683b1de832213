"""Frozen weights in few bits: blocks along the input share a scale, and a product sees them as floats again.

    int8: w ~ s q,    q = round(w / s) in -127..127,  s = max |w| / 127
    nf4:  w ~ s c_q,  c the 16 levels of NF4 in -1..1, s = max |w|   (Dettmers et al. 2023, section 3 and appendix E)

Only the linear layers are stored so; embeddings, head and norms stay as they are, and nothing of it is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from aif.types import BadInput, Params

KINDS = ("int8", "nf4")
BLOCKS = (64, 32, 16, 8, 4, 2)  # numbers that share a scale: the first that divides the input
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A stack of weights `[..., in, out]`, which `astype` turns into floats; NF4 keeps two codes in a byte."""

    codes: Int[Array, "*stack rows out"]
    scales: Float[Array, "*stack blocks out"]
    kind: str = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weights."""
        *stack, rows, out = self.codes.shape
        return (*stack, rows * (2 if self.kind == "nf4" else 1), out)

    def astype(self, dtype: Any) -> Float[Array, "*stack in out"]:
        """The weights as floats."""
        shape, codes = self.shape, self.codes
        if self.kind == "nf4":
            codes = jnp.stack([codes & 15, codes >> 4], axis=-2).reshape(shape)
            values = jnp.array(NF4, jnp.float32)[codes]
        else:
            values = codes.astype(jnp.float32)
        return _by_scale(values, self.scales, jnp.multiply).astype(dtype)


def _by_scale(values: Array, scales: Array, how: Any) -> Array:
    """Every value multiplied or divided by the scale of its block."""
    *stack, rows, out = values.shape
    blocks = values.reshape(*stack, scales.shape[-2], -1, out)
    return how(blocks, scales[..., None, :]).reshape(values.shape)


@partial(jax.jit, static_argnames="kind")
def quantised(weights: Float[Array, "*stack in out"], kind: str) -> Quantised:
    """Weights in few bits.

    Raises:
      BadInput: the input has an odd width, which no block divides.
    """
    *stack, rows, out = weights.shape
    size = next((n for n in BLOCKS if rows % n == 0), None)
    if size is None:
        raise BadInput(f"{kind}: weights with an input of {rows} cannot be stored in it; take the model as it is")
    largest = jnp.max(jnp.abs(weights.reshape(*stack, rows // size, size, out)), axis=-2)
    scales = jnp.where(largest > 0, largest, 1.0) / (127 if kind == "int8" else 1)
    parts = _by_scale(weights, scales, jnp.divide)
    if kind == "int8":
        return Quantised(jnp.round(parts).astype(jnp.int8), scales, kind)
    levels = jnp.array(NF4, jnp.float32)
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, parts).astype(jnp.uint8)  # the nearest level
    low, high = jnp.moveaxis(codes.reshape(*stack, rows // 2, 2, out), -2, 0)
    return Quantised(low | (high << 4), scales, kind)


def stored(x: Quantised, put: Callable[[str, Array], Array]) -> Quantised:
    """The same weights with their codes and scales where `put(name, array)` has put them."""
    return replace(x, codes=put("codes", x.codes), scales=put("scales", x.scales))


def _stored(x: Any) -> bool:
    return isinstance(x, Quantised)


def in_few_bits(params: Params) -> bool:
    """Whether some of the parameters are stored so, and cannot be trained themselves."""
    return any(map(_stored, jax.tree.leaves(params, is_leaf=_stored)))


def floats(params: Params) -> Params:
    """Parameters whose weights are all arrays, float32 where they were stored in few bits."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _stored(x) else x, params, is_leaf=_stored)
