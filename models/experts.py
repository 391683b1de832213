"""Mixtures of experts: a router sends every token to a few of E feed-forward networks, and none is ever dropped.

    y = sum over the k chosen experts of p_e * down_e(act(gate_e(x)) * up_e(x))

Tokens are sorted by expert, so that each weight `[E, in, out]` meets its own rows in one ragged product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from .layers import Layer, activation


def route(
    x: Float[Array, "M D"], router: Float[Array, "D E"], count: int, norm: bool
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """Weights and numbers of the `count` likeliest experts of every token; `norm` makes the weights sum to one.

    p = softmax(x W) over all experts, in float32 (Shazeer et al. 2017, without noise).
    """
    p = jax.nn.softmax((x @ router.astype(x.dtype)).astype(jnp.float32), axis=-1)
    weight, chosen = jax.lax.top_k(p, count)
    return (weight / jnp.sum(weight, axis=-1, keepdims=True) if norm else weight), chosen


def expert_linear(
    x: Float[Array, "M I"], sizes: Int[Array, "E"], layer: Layer, lora: dict[str, Array] | None
) -> Float[Array, "M O"]:
    """`linear` where the first sizes[0] rows meet expert 0, the next sizes[1] expert 1, and so on."""
    y = jax.lax.ragged_dot(x, layer["w"].astype(x.dtype), sizes)
    if lora is not None:
        scale = jax.lax.stop_gradient(lora["scale"]).astype(x.dtype)
        low = jax.lax.ragged_dot(x, lora["a"].astype(x.dtype), sizes) * scale
        y = y + jax.lax.ragged_dot(low, lora["b"].astype(x.dtype), sizes)
    return y


def mixture(x: Float[Array, "M D"], w: dict, lora: dict, *, count: int, norm: bool, act: str) -> Float[Array, "M D"]:
    """The feed-forward part of a block: `w` holds router, gate, up and down, the last three `[E, in, out]`."""
    weight, chosen = route(x, w["router"]["w"], count, norm)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=w["gate"]["w"].shape[0]).astype(jnp.int32)
    rows = x[order // count]
    gate, up = (expert_linear(rows, sizes, w[name], lora.get(name)) for name in ("gate", "up"))
    out = expert_linear(activation(gate, act) * up, sizes, w["down"], lora.get("down"))
    out = out[jnp.argsort(order)].reshape(*chosen.shape, -1)  # back to token order
    return jnp.einsum("mk,mkd->md", weight.astype(out.dtype), out)
