"""One decoder for the Llama family: a pure forward over stacked layers, and the NNX class at its edge.

    h = embed[tokens];  for every block:  h += attention(norm(h));  h += mlp(norm(h));  h = edit(h + adapter vector)

Adapter, edits and tap travel beside the weights as values; none of them is a hook, and leaving one out (None) leaves
it out of the compiled program. The loop over layers is one `lax.scan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from aif.types import Adapter, Edits, Output, Params, Tap

from .layers import attention, edit, linear, rms_norm, rotary_angles, rotate, visible

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one model; hashable, so that it can be a static argument of a jitted function."""

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    max_position: int = 2048

    def target_shape(self, target: str) -> tuple[int, int]:
        """(in, out) of a linear layer named in TARGETS."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.width, q),
            "k": (self.width, kv),
            "v": (self.width, kv),
            "o": (q, self.width),
            "gate": (self.width, self.ff),
            "up": (self.width, self.ff),
            "down": (self.ff, self.width),
        }[target]


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, stacked or a layer at a time; the first `length` slots are filled."""

    k: Float[Array, "L B G S d"] | tuple[Float[Array, "B G S d"], ...]
    v: Float[Array, "L B G S d"] | tuple[Float[Array, "B G S d"], ...]
    segments: Int[Array, "B S"]
    branches: Int[Array, "B S"]
    length: Int[Array, ""]


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache with room for `slots` tokens in each of `rows` rows."""
    shape = (config.layers, rows, config.kv_heads, slots, config.head_dim)
    blank = jnp.zeros((rows, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), blank, blank, jnp.int32(0))


def shapes(config: DecoderConfig) -> Params:
    """The shape of every parameter, in the layout that `forward` reads."""
    L, D = config.layers, config.width
    layer: dict[str, Any] = {"attn_norm": (L, D), "mlp_norm": (L, D)}
    for target in TARGETS:
        layer[target] = {"w": (L, *config.target_shape(target))}
        if config.qkv_bias and target in ("q", "k", "v"):
            layer[target]["b"] = (L, config.target_shape(target)[1])
    tree: Params = {"embed": (config.vocab, D), "layers": layer, "norm": (D,)}
    if not config.tied:
        tree["head"] = (config.vocab, D)
    return tree


def head(params: Params) -> Float[Array, "V D"]:
    """The vocabulary head; the embedding itself when tied."""
    return params["head"] if "head" in params else params["embed"]


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "linear": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    branches: Int[Array, "B T"] | None = None,
    adapter: Adapter | None = None,
    edits: Edits | None = None,
    tap: Tap | None = None,
    cache: Cache | None = None,
    remat: str = "none",
    compute_dtype: Any = jnp.float32,
) -> Output:
    """Residual stream of every token after the final norm, `[B, T, D]`; `logits` turns it into logits.

    Args:
      tokens: token ids; positions default to 0..T-1, segments to 1 (one text a row), branches to 0.
      adapter: low-rank or vector adapter; None is the base model, which is also the reference model.
      edits: steering at every block's output.
      tap: function of the residual after each block (and after its edit); its values come back stacked over L.
      cache: keys and values of earlier tokens; the new ones are appended and returned.
      remat: what the backward pass recomputes: none, dots (keep every matrix product), linear, full.

    Returns:
      Output(hidden, taps, cache).
    """
    B, T = tokens.shape
    offset = cache.length if cache is not None else 0
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T) + offset, (B, T))
    segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
    branches = jnp.zeros((B, T), jnp.int32) if branches is None else branches
    if cache is None:
        seen = visible(segments, branches, segments, branches)
    else:
        put = partial(jax.lax.dynamic_update_slice, start_indices=(0, offset))
        cache = cache._replace(segments=put(cache.segments, segments), branches=put(cache.branches, branches))
        seen = visible(segments, branches, cache.segments, cache.branches, offset)
    bias = jnp.where(seen, 0.0, -1e30).astype(jnp.float32)
    cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    h = params["embed"][tokens].astype(compute_dtype)

    def heads(x: Array, n: int) -> Array:
        return x.reshape(B, T, n, config.head_dim)

    def block(carry: tuple, layer: tuple) -> tuple:
        h, kv = carry
        number, w, lora, steer = layer
        lora = lora or {}
        x = rms_norm(h, w["attn_norm"], config.norm_eps).reshape(B * T, -1)
        q = rotate(heads(linear(x, w["q"], lora.get("q")), config.heads), cos, sin).transpose(0, 2, 1, 3)
        k = rotate(heads(linear(x, w["k"], lora.get("k")), config.kv_heads), cos, sin).transpose(0, 2, 1, 3)
        v = heads(linear(x, w["v"], lora.get("v")), config.kv_heads).transpose(0, 2, 1, 3)
        if kv is not None:
            (k, v), kv = _extended(kv, number, offset, (k, v))
        mixed = attention(q, k, v, bias).transpose(0, 2, 1, 3).reshape(B * T, -1)
        h = h + linear(mixed, w["o"], lora.get("o")).reshape(B, T, -1)
        x = rms_norm(h, w["mlp_norm"], config.norm_eps).reshape(B * T, -1)
        gated = jax.nn.silu(linear(x, w["gate"], lora.get("gate"))) * linear(x, w["up"], lora.get("up"))
        h = h + linear(gated, w["down"], lora.get("down")).reshape(B, T, -1)
        if "vector" in lora:
            scale = jax.lax.stop_gradient(lora["vector"]["scale"])
            h = h + (scale * lora["vector"]["u"]).astype(h.dtype)
        if steer is not None:
            h = edit(h, *steer, mask=edits.mask)  # pyright: ignore[reportOptionalMemberAccess]
        return (h, kv), (tap(h) if tap is not None else None)

    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat])
    steer = None if edits is None else (edits.vector, edits.add, edits.gain, edits.target)
    kv = None if cache is None else (cache.k, cache.v)
    (h, kv), taps = _through(block, (h, kv), config.layers, params["layers"], (adapter, steer))
    if cache is not None and kv is not None:
        cache = cache._replace(k=kv[0], v=kv[1], length=offset + T)
    return Output(rms_norm(h, params["norm"], config.norm_eps), taps, cache)


def apart(stacked: Any, layers: int) -> tuple:
    """Values stacked over layers as a tuple of one per layer: what a loop that runs them many times should hold, since
    a scan copies every layer's weights out of the stack each time."""
    return tuple(jax.tree.map(itemgetter(n), stacked) for n in range(layers))


def _through(block: Any, carry: tuple, layers: int, weights: Any, beside: tuple) -> tuple[tuple, Any]:
    """All blocks in turn: a scan over stacked weights, or a plain loop over weights that are `apart`."""
    if not isinstance(weights, tuple):
        return jax.lax.scan(block, carry, (jnp.arange(layers), weights, *beside))
    taps = []
    for number, (w, values) in enumerate(zip(weights, apart(beside, layers), strict=True)):
        carry, tapped = block(carry, (number, w, *values))
        taps.append(tapped)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *taps)


def _extended(kv: tuple, number: Any, offset: Any, new: tuple[Array, Array]) -> tuple[tuple, tuple]:
    """A layer's keys and values with the `new` ones put in from slot `offset` on, and the cache that holds them."""
    put = jax.lax.dynamic_update_slice
    if isinstance(kv[0], tuple):
        k, v = (put(old[number], x, (0, 0, offset, 0)) for old, x in zip(kv, new, strict=True))
        return (k, v), tuple((*old[:number], x, *old[number + 1 :]) for old, x in zip(kv, (k, v), strict=True))
    kv = tuple(put(old, x[None], (number, 0, 0, offset, 0)) for old, x in zip(kv, new, strict=True))
    return tuple(jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in kv), kv


def logits(params: Params, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
    """hidden E^T in float32. For a few positions at a time: training never builds this for a whole batch."""
    weight = head(params)
    return jnp.einsum("...d,vd->...v", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)


class Decoder(nnx.Module):
    """The model as an NNX module, for users who live in NNX; its state is the nested dict that `forward` reads.

    Fresh weights are normal with standard deviation 0.02, norms start at one and biases at zero.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def start(path: tuple, shape: tuple) -> nnx.Param:
            name = path[-1].key
            if name.endswith("norm"):
                return nnx.Param(jnp.ones(shape))
            return nnx.Param(jnp.zeros(shape) if name == "b" else 0.02 * jax.random.normal(rngs.params(), shape))

        tree = jax.tree_util.tree_map_with_path(start, shapes(config), is_leaf=lambda x: isinstance(x, tuple))
        self.config = config
        self.params = _as_nnx(tree)

    def __call__(self, tokens: Int[Array, "B T"], **values: Any) -> Output:
        return forward(self.config, self.pure_params(), tokens, **values)

    def pure_params(self) -> Params:
        """The nested dict of arrays behind the module."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))["params"]


def _as_nnx(tree: Any) -> Any:
    return nnx.Dict({k: _as_nnx(v) for k, v in tree.items()}) if isinstance(tree, dict) else tree


def random_params(config: DecoderConfig, seed: int = 0) -> Params:
    """Fresh parameters of a model that has never been trained."""
    return Decoder(config, rngs=nnx.Rngs(seed)).pure_params()
