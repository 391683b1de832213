"""The pieces of a decoder block, as pure functions on arrays.

Every matrix product runs on 2-D operands `[B*T, D] @ [D, out]`: on CPU this is what reaches the peak of the machine.
Norms, rotary angles and softmax are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Num

from .quantised import Quantised

Layer = dict[str, Array | Quantised]  # the weight "w" of a linear layer, and its bias "b" if it has one
KEPT = "kept"  # the name of what the remat policy `linear` does not compute again


def kept(x: Array) -> Array:
    """x, marked as worth its memory until the backward pass."""
    return checkpoint_name(x, KEPT)


def rms_norm(x: Float[Array, "*shape D"], gain: Float[Array, "D"], eps: float) -> Float[Array, "*shape D"]:
    """x / sqrt(mean(x^2) + eps) * gain, in float32 (Zhang & Sennrich 2019, eq. 4)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * gain.astype(jnp.float32)).astype(x.dtype)


def product(x: Float[Array, "M I"], w: Any) -> Float[Array, "M O"]:
    """x W in x's type. Narrow types are summed in float32 and rounded once, here and in the gradient: matrix units do
    so by themselves, and XLA uses a CPU's (AMX) for bfloat16 only where float32 is returned."""
    w = w.astype(x.dtype)
    return x @ w if x.dtype == jnp.float32 else _narrow_product(x, w)


def _summed_wide(x: Array, w: Array, *, over: tuple[int, int]) -> Array:
    """Their product over an axis of either. Transposing a factor first would cost the CPU its matrix unit."""
    axes = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _narrow_product(x: Array, w: Array) -> Array:
    return _summed_wide(x, w, over=(1, 0))


def _narrow_product_forward(x: Any, w: Any) -> tuple[Array, tuple[Array | None, Array]]:
    return _narrow_product(x.value, w.value), (x.value if w.perturbed else None, w.value)


def _narrow_product_backward(kept: tuple[Array | None, Array], ct: Array) -> tuple[Array, Array | None]:
    """Frozen weights get no gradient, and nothing is kept for one."""
    x, w = kept
    return _summed_wide(ct, w, over=(1, 1)), None if x is None else _summed_wide(x, ct, over=(0, 0))


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward, symbolic_zeros=True)


def linear(x: Float[Array, "M I"], layer: Layer, lora: dict[str, Array] | None) -> Float[Array, "M O"]:
    """x W (+ bias) + scale (x A) B."""
    return linears(x, [layer], [lora])[0]


def linears(
    x: Float[Array, "M I"], layers: Sequence[Layer], loras: Sequence[dict[str, Array] | None]
) -> list[Float[Array, "M _"]]:
    """x W_k (+ bias_k) + scale_k (x A_k) B_k for several layers k of one input.

    The low-rank product keeps its brackets, so neither A B nor the dense gradient of W ever exists, and the layers' A
    stand side by side in one product. `scale` is a constant of the adapter: no gradient flows to it.
    """
    out = [product(x, layer["w"]) for layer in layers]
    out = [y + layer["b"].astype(x.dtype) if "b" in layer else y for y, layer in zip(out, layers, strict=True)]
    given = [(k, lora) for k, lora in enumerate(loras) if lora is not None]
    if given:
        low = kept(product(x, jnp.concatenate([lora["a"] for _, lora in given], axis=1)))
        ends = np.cumsum([lora["a"].shape[1] for _, lora in given])[:-1]
        for (k, lora), part in zip(given, jnp.split(low, ends, axis=1), strict=True):
            scale = jax.lax.stop_gradient(lora["scale"]).astype(x.dtype)
            out[k] = out[k] + product(part * scale, lora["b"])
    return [kept(y) for y in out]


def rotary_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: tuple | None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of position * theta^(-2i/d), i < d/2 (Su et al. 2021, eq. 15).

    `scaling` is None, or ("llama3", factor, low, high, original): wavelengths longer than original/low are divided by
    `factor`, those shorter than original/high are kept, and a linear ramp joins the two (the Llama 3.1 rule); or
    ("linear", factor): every frequency divided by `factor`; or ("longrope", factors, size): each frequency divided by
    a factor of its own, and cos and sin multiplied by `size` (Ding et al. 2024, as Phi-3 stores it).
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    size = 1.0
    if scaling is not None and scaling[0] == "longrope":
        frequency, size = frequency / jnp.array(scaling[1], jnp.float32), scaling[2]
    elif scaling is not None and scaling[0] == "linear":
        frequency = frequency / scaling[1]
    elif scaling is not None and scaling[0] == "llama3":
        _, factor, low, high, original = scaling
        turns = original * frequency / (2 * jnp.pi)  # full turns within the original context
        ramp = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = (1 - ramp) * frequency / factor + ramp * frequency
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if size == 1.0 else (cos * size, sin * size)


def rotate(x: Num[Array, "B T H d"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]) -> Array:
    """Rotary embedding in the half-split layout of Hugging Face checkpoints; dimensions beyond the angles stay."""
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], cos, sin), x[..., turned:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def visible(
    query_segments: Int[Array, "B T"],
    query_branches: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    key_branches: Int[Array, "B S"],
    offset: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
    """Which keys a query sees: earlier or equal slot, same segment, and the prompt's branch (0) or its own.

    `offset` is the slot of the first query (the filled length of the cache when decoding). A padding query (segment 0)
    sees only padding, so its softmax stays finite.
    """
    query_slot = jnp.arange(query_segments.shape[1]) + offset
    causal = jnp.arange(key_segments.shape[1])[None, :] <= query_slot[:, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    branch = (key_branches[:, None, :] == 0) | (query_branches[:, :, None] == key_branches[:, None, :])
    return causal[None] & same & branch


def within_window(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"]:
    """Which keys lie less than `window` positions before a query. Positions, not slots: an answer continues its prompt
    wherever it is packed."""
    return query_positions[:, :, None] - key_positions[:, None, :] < window


BLOCK, BLOCKS = 64, 8  # queries at a time (at least), and how many blocks at most: small ones stay in cache


def attention(
    q: Float[Array, "B H T d"],
    k: Float[Array, "B G S d"],
    v: Float[Array, "B G S d"],
    bias: Float[Array, "B T S"],
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B H T d"]:
    """softmax(capped(scale q k^T) + bias) v, where H/G query heads share a key head (GQA).

    `scale` is 1 / sqrt(d) unless given; `cap` bounds a score s to cap tanh(s / cap) (Gemma 2). The heads that share a
    key head are rows of one product, and no key is repeated. Without a cache (T = S) the loop over blocks of queries,
    unrolled at trace time, skips the keys after each block.
    """
    (B, H, T, d), (G, S) = q.shape, k.shape[1:3]
    share, size = H // G, T if T != S else max(BLOCK, -(-T // BLOCKS))
    factor = d**-0.5 if scale is None else scale
    q = q.reshape(B, G, share, T, d)

    def block(a: int, b: int, seen: int) -> Array:
        rows, hidden = q[:, :, :, a:b].reshape(B, G, -1, d), jnp.tile(bias[:, a:b, :seen], (1, share, 1))
        mixed = _attend(rows, k[:, :, :seen], v[:, :, :seen], hidden, scale=factor, cap=cap)
        return mixed.reshape(B, G, share, b - a, d)

    ends = [(start, min(start + size, T)) for start in range(0, T, size)]
    blocks = [block(a, b, S if T != S else b) for a, b in ends]
    return jnp.concatenate(blocks, axis=3).reshape(B, H, T, d)


def _attend(q: Array, k: Array, v: Array, bias: Array, *, scale: float, cap: float | None) -> Array:
    scores = capped(jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * scale, cap)
    weights = jax.nn.softmax(scores + bias[:, None], axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


def capped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap tanh(x / cap), which keeps x within -cap..cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def activation(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """`silu`, x sigmoid(x), or `gelu`, its tanh approximation (what Gemma calls gelu_pytorch_tanh)."""
    return jax.nn.silu(x) if name == "silu" else jax.nn.gelu(x, approximate=True)


def edit(
    h: Float[Array, "B T D"],
    vector: Float[Array, "K D"],
    add: Float[Array, "#B K"],
    gain: Float[Array, "#B K"],
    target: Float[Array, "#B K"],
    mask: Float[Array, "#B #T"],
) -> Float[Array, "B T D"]:
    """One layer of `Edits`: h + mask * sum_k [add_k + gain_k (target_k - h . vhat_k)] vhat_k."""
    B, T, D = h.shape
    along = (h.reshape(B * T, D) @ vector.T.astype(h.dtype)).reshape(B, T, -1).astype(jnp.float32)
    push = (add[:, None] + gain[:, None] * (target[:, None] - along)) * mask[..., None]
    return h + (push.reshape(B * T, -1) @ vector.astype(jnp.float32)).reshape(B, T, D).astype(h.dtype)
