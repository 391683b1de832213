"""One decoder for all families: a pure forward over stacked layers. `module.py` has it as an NNX module.

    h = embed[tokens];  for every block:  h += attention(norm(h));  h += mlp(norm(h));  h = edit(h + adapter vector)

What sets families apart is data in `DecoderConfig`, and a switch that is off leaves nothing in the program. Adapter,
edits and tap travel beside the weights as values; none of them is a hook, and leaving one out (None) leaves it out of
the compiled program. The loop over layers is one `lax.scan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from aif.types import Adapter, Edits, Output, Params, Rows, Tap

from .experts import mixture
from .layers import (
    KEPT,
    activation,
    attention,
    capped,
    edit,
    kept,
    linear,
    linears,
    rms_norm,
    rotary_angles,
    rotate,
    visible,
    within_window,
)

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
MIXTURE = ("router", "gate", "up", "down")  # what a mixture of experts reads


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one model; hashable, so that it can be a static argument of a jitted function.

    `local` says of every layer whether it sees only the last `window` positions; such layers turn by `local_theta`
    where that is given. With `experts`, the feed-forward part is a mixture whose members are `ff` wide.
    """

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
    rotary_dim: int | None = None  # dimensions of a head that turn; all of them when None
    qk_norm: bool = False  # RMS norm of every query and key head
    post_norms: bool = False  # norms after attention and feed-forward too, before they are added
    act: str = "silu"
    embed_scale: float = 1.0
    attention_scale: float | None = None  # 1 / sqrt(head_dim) when None
    attention_cap: float | None = None
    logit_cap: float | None = None
    window: int | None = None
    local: tuple[bool, ...] = ()
    local_theta: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    norm_experts: bool = True  # whether the weights of a token's experts sum to one

    def target_shape(self, target: str) -> tuple[int, ...]:
        """(in, out) of a linear layer named in TARGETS; (experts, in, out) where there is one an expert."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        lead = (self.experts,) if self.experts and target in ("gate", "up", "down") else ()
        return (
            lead
            + {
                "q": (self.width, q),
                "k": (self.width, kv),
                "v": (self.width, kv),
                "o": (q, self.width),
                "gate": (self.width, self.ff),
                "up": (self.width, self.ff),
                "down": (self.ff, self.width),
            }[target]
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """The vocabulary head: hidden `[..., D]` -> logits `[..., V]` = capped(hidden E^T), in float32.

    `shared` devices share the hidden states' rows among them, so that so many times as many may meet it at a time;
    `whole` says that devices share its own rows, which are best left together.
    """

    weight: Float[Array, "V D"]
    cap: float | None = field(default=None, metadata={"static": True})
    shared: int = field(default=1, metadata={"static": True})
    whole: bool = field(default=False, metadata={"static": True})

    def __call__(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        weight = self.weight.astype(hidden.dtype)
        return capped(jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32), self.cap)


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, stacked or a layer at a time; the first `length` slots are filled."""

    k: Float[Array, "L B G S d"] | tuple[Float[Array, "B G S d"], ...]
    v: Float[Array, "L B G S d"] | tuple[Float[Array, "B G S d"], ...]
    segments: Int[Array, "B S"]
    branches: Int[Array, "B S"]
    positions: Int[Array, "B S"] | None  # None unless an attention window asks for them
    length: Int[Array, ""]


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache with room for `slots` tokens in each of `rows` rows."""
    shape = (config.layers, rows, config.kv_heads, slots, config.head_dim)
    blank = jnp.zeros((rows, slots), jnp.int32)
    positions = blank if config.window else None
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), blank, blank, positions, jnp.int32(0))


def shapes(config: DecoderConfig) -> Params:
    """The shape of every parameter, in the layout that `forward` reads."""
    L, D = config.layers, config.width
    layer: dict[str, Any] = {"attn_norm": (L, D), "mlp_norm": (L, D)}
    if config.post_norms:
        layer |= {"attn_post_norm": (L, D), "mlp_post_norm": (L, D)}
    if config.qk_norm:
        layer |= {"q_norm": (L, config.head_dim), "k_norm": (L, config.head_dim)}
    if config.experts:
        layer["router"] = {"w": (L, D, config.experts)}
    for target in TARGETS:
        layer[target] = {"w": (L, *config.target_shape(target))}
        if config.qkv_bias and target in ("q", "k", "v"):
            layer[target]["b"] = (L, config.target_shape(target)[1])
    tree: Params = {"embed": (config.vocab, D), "layers": layer, "norm": (D,)}
    if not config.tied:
        tree["head"] = (config.vocab, D)
    return tree


def head(params: Params) -> Float[Array, "V D"]:
    """The weight of the vocabulary head; the embedding itself when tied."""
    return params["head"] if "head" in params else params["embed"]


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "linear": jax.checkpoint_policies.save_only_these_names(KEPT),
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
    rows: Rows | None = None,
) -> Output:
    """Residual stream of every token after the final norm, `[B, T, D]`; `logits` turns it into logits.

    Args:
      tokens: token ids; positions default to 0..T-1, segments to 1 (one text a row), branches to 0.
      adapter: low-rank or vector adapter; None is the base model, which is also the reference model.
      edits: steering at every block's output.
      tap: function of the residual after each block (and after its edit); its values come back stacked over L.
      cache: keys and values of earlier tokens; the new ones are appended and returned.
      remat: what the backward pass recomputes: none, dots (keep every matrix product), linear, full.
      rows: what several devices make of rows: where those of the residual stream lie, and who runs experts on them.

    Returns:
      Output(hidden, taps, cache).
    """
    B, T = tokens.shape
    offset = cache.length if cache is not None else 0
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T) + offset, (B, T))
    segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
    branches = jnp.zeros((B, T), jnp.int32) if branches is None else branches
    cache, views = _views(config, positions, segments, branches, cache)
    h = params["embed"][tokens].astype(compute_dtype)
    h = h if config.embed_scale == 1.0 else h * jnp.asarray(config.embed_scale, compute_dtype)
    h = h if rows is None else rows.keep(h)

    def block(carry: tuple, layer: tuple) -> tuple:
        h, kv = carry
        number, w, lora, steer, local = layer
        lora = lora or {}
        view = views[0] if local is None else jax.tree.map(partial(jnp.where, local), views[1], views[0])
        x = rms_norm(h, w["attn_norm"], config.norm_eps)
        mixed, kv = _attention(config, x, w, lora, view, kv, (number, offset))
        h = h + (rms_norm(mixed, w["attn_post_norm"], config.norm_eps) if config.post_norms else mixed)
        mixed = _feed_forward(config, rms_norm(h, w["mlp_norm"], config.norm_eps), w, lora, rows)
        h = h + (rms_norm(mixed, w["mlp_post_norm"], config.norm_eps) if config.post_norms else mixed)
        if "vector" in lora:
            scale = jax.lax.stop_gradient(lora["vector"]["scale"])
            h = h + (scale * lora["vector"]["u"]).astype(h.dtype)
        if steer is not None:
            h = edit(h, *steer, mask=edits.mask)  # pyright: ignore[reportOptionalMemberAccess]
        h = h if rows is None else rows.keep(h)
        return (h, kv), (tap(h) if tap is not None else None)

    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat])
    steer = None if edits is None else (edits.vector, edits.add, edits.gain, edits.target)
    kv = None if cache is None else (cache.k, cache.v)
    local = jnp.array(config.local) if len(views) == 2 else None
    (h, kv), taps = _through(block, (h, kv), config.layers, params["layers"], (adapter, steer, local))
    if cache is not None and kv is not None:
        cache = cache._replace(k=kv[0], v=kv[1], length=offset + T)
    return Output(rms_norm(h, params["norm"], config.norm_eps), taps, cache)


class View(NamedTuple):
    """What a layer's queries see and how far they turn: an additive mask, and cosines and sines."""

    bias: Float[Array, "B T S"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def _views(
    config: DecoderConfig,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"],
    cache: Cache | None,
) -> tuple[Cache | None, tuple[View, ...]]:
    """The cache with the new tokens' places, and the view of all layers, or those of global and of local ones."""
    offset, keys = 0, (segments, branches, positions)
    if cache is not None:
        offset = cache.length
        put = partial(jax.lax.dynamic_update_slice, start_indices=(0, offset))
        cache = cache._replace(segments=put(cache.segments, segments), branches=put(cache.branches, branches))
        if cache.positions is not None:
            cache = cache._replace(positions=put(cache.positions, positions))
        keys = (cache.segments, cache.branches, cache.positions)
    seen = visible(segments, branches, *keys[:2], offset)

    def view(seen: Array, theta: float, scaling: tuple | None) -> View:
        bias = jnp.where(seen, 0.0, -1e30).astype(jnp.float32)
        turned = config.rotary_dim or config.head_dim
        return View(bias, *rotary_angles(positions, turned, theta, scaling))

    views = (view(seen, config.rope_theta, config.rope_scaling),)
    if config.window:
        near = seen & within_window(positions, keys[2], config.window)  # pyright: ignore[reportArgumentType]
        theta, scaling = config.rope_theta, config.rope_scaling
        if config.local_theta is not None:
            theta, scaling = config.local_theta, None
        views = (*views, view(near, theta, scaling))
    return cache, views[1:] if all(config.local) and config.window else views


def _attention(
    config: DecoderConfig, x: Float[Array, "B T D"], w: dict, lora: dict, view: View, kv: tuple | None, at: tuple
) -> tuple[Float[Array, "B T D"], tuple | None]:
    """The attention part of a block; with a cache (`kv`), new keys and values are put at
    layer and slot `at`, and all are seen."""
    B, T, _ = x.shape
    x = x.reshape(B * T, -1)

    made = linears(x, [w[target] for target in "qkv"], [lora.get(target) for target in "qkv"])
    q, k, v = (y.reshape(B, T, -1, config.head_dim) for y in made)
    if config.qk_norm:
        q, k = (rms_norm(y, w[name], config.norm_eps) for y, name in ((q, "q_norm"), (k, "k_norm")))
    q, k = (rotate(y, view.cos, view.sin) for y in (q, k))
    q, k, v = (kept(y.transpose(0, 2, 1, 3)) for y in (q, k, v))
    if kv is not None:
        (k, v), kv = _extended(kv, at[0], at[1], (k, v))
    mixed = attention(q, k, v, view.bias, config.attention_scale, config.attention_cap)
    mixed = kept(mixed.transpose(0, 2, 1, 3).reshape(B * T, -1))
    return linear(mixed, w["o"], lora.get("o")).reshape(B, T, -1), kv


def _feed_forward(
    config: DecoderConfig, x: Float[Array, "B T D"], w: dict, lora: dict, rows: Rows | None
) -> Float[Array, "B T D"]:
    """The feed-forward part of a block: down(act(gate(x)) * up(x)), or a mixture of such."""
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    if config.experts:
        many = {"count": config.experts_per_token, "norm": config.norm_experts, "act": config.act}
        run = partial(mixture, **many) if rows is None else rows.each(partial(mixture, **many))
        own = [{name: parts[name] for name in MIXTURE if name in parts} for parts in (w, lora)]
        return run(x, *own).reshape(shape)
    gate, up = linears(x, [w["gate"], w["up"]], [lora.get("gate"), lora.get("up")])
    return linear(activation(gate, config.act) * up, w["down"], lora.get("down")).reshape(shape)


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


def logits(params: Params, hidden: Float[Array, "*shape D"], cap: float | None = None) -> Float[Array, "*shape V"]:
    """capped(hidden E^T) in float32. For a few positions at a time: training never builds this for a whole batch."""
    return Head(head(params), cap)(hidden)
