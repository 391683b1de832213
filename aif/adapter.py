"""Adapters as data: low-rank factors, steering vectors and whole weight changes in a dict of stacked arrays.

    {"q": {"a": [L, in, r], "b": [L, r, out], "scale": [L]}, ..., "vector": {"u": [L, D], "scale": [L]}}
    {"layers/q/w": {"d": [L, in, out]}, "embed": {"d": [1, V, D]}, ...}

(`[L, E, in, r]` and `[L, E, r, out]` for the layers of E experts.)

A low-rank target adds `scale (x A) B` to its linear layer; a vector adds `scale u` to the residual at the block's
output. `scale` is a constant of the adapter (alpha / rank, and 0 in layers it leaves alone). A full fine-tune is the
change d of every weight: what is rescaled, drawn at random or compared is the same for all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from aif.errors import BadInput
from aif.models.decoder import TARGETS, DecoderConfig
from aif.types import Adapter

DRAWN = ("a", "b", "u", "d")  # leaves that hold a solution's values
LINEAR = ("b", "u", "d")  # those that its effect is proportional to


def _layer_mask(config: DecoderConfig, layers: Sequence[int] | None) -> Array:
    wrong = [l for l in layers or () if not 0 <= l < config.layers]
    if wrong:
        raise BadInput(f"adapter.layers: layer {wrong[0]} is out of range; the model has layers 0..{config.layers - 1}")
    chosen = jnp.arange(config.layers) if layers is None else jnp.array(layers)
    return jnp.zeros(config.layers).at[chosen].set(1.0)


def lora(
    config: DecoderConfig,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    key: Array,
) -> Adapter:
    """A fresh low-rank adapter: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, so it starts as the base model bit for bit.

    Source: Hu et al. 2021, section 4.1 (scale = alpha / rank).
    """
    wrong = [t for t in targets if t not in TARGETS]
    if wrong:
        raise BadInput(f"adapter.targets: no layer is called {wrong[0]!r}; choose from {', '.join(TARGETS)}")
    scale = _layer_mask(config, layers) * (alpha / rank)
    adapter: Adapter = {}
    for number, target in enumerate(targets):
        *lead, wide, out = config.target_shape(target)
        bound = wide**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (config.layers, *lead, wide, rank), minval=-bound, maxval=bound
        )
        adapter[target] = {"a": a, "b": jnp.zeros((config.layers, *lead, rank, out)), "scale": scale}
    return adapter


def steering_vector(config: DecoderConfig, *, layers: Sequence[int] | None = None) -> Adapter:
    """A trainable vector per chosen layer's output, zero at the start."""
    return {"vector": {"u": jnp.zeros((config.layers, config.width)), "scale": _layer_mask(config, layers)}}


def check(adapter: dict[str, Any], config: DecoderConfig, where: str = "adapter") -> Adapter:
    """The adapter, if it is one of this model.

    Raises:
      BadInput: it holds something else, or arrays of other shapes.
    """
    L = config.layers
    for name, target in adapter.items():
        if name != "vector" and name not in TARGETS or not isinstance(target, dict):
            raise BadInput(f"{where}: holds {name!r}, which is no part of an adapter; name a file that an arm trained")
        found = {leaf: x.shape for leaf, x in target.items()}
        *lead, wide, out = (0, 0) if name == "vector" else config.target_shape(name)
        rank = found.get("a", (0,))[-1]
        wanted = (
            {"a": (L, *lead, wide, rank), "b": (L, *lead, rank, out)} if name != "vector" else {"u": (L, config.width)}
        )
        if found != {**wanted, "scale": (L,)}:
            raise BadInput(f"{where}: {name} does not fit this model; train the adapter on this model")
    return adapter


def change(params: dict, base: dict) -> Adapter:
    """A full fine-tune as the change of every weight, `params - base`; arrays outside the layers count as one layer."""
    out: Adapter = {}
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(base), strict=True):
        names = [k.key for k in path]
        moved = new - old
        out["/".join(names)] = {"d": moved if names[0] == "layers" else moved[None]}
    return out


def changed(params: dict, adapter: Adapter) -> tuple[dict, Adapter | None]:
    """(the weights with whole changes added, what of the adapter stays beside them)."""
    whole = {name: part["d"] for name, part in adapter.items() if "d" in part}
    if not whole:
        return params, adapter

    def add(path: tuple, x: Array) -> Array:
        d = whole.get("/".join(k.key for k in path))
        return x if d is None else x + d.reshape(x.shape).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(add, params), {n: p for n, p in adapter.items() if n not in whole} or None


def _product(x: dict[str, Array], y: dict[str, Array]) -> Float[Array, "L"]:
    """<x, y> of one part per layer: trace((A_x^T A_y)(B_y B_x^T)) with the scales, or of u, or of d."""
    if "d" in x:
        return jnp.sum(x["d"] * y["d"], axis=tuple(range(1, x["d"].ndim)))
    scales = x["scale"] * y["scale"]
    if "u" in x:
        return scales * jnp.sum(x["u"] * y["u"], axis=-1)
    gram_a = jnp.einsum("l...ir,l...is->l...rs", x["a"], y["a"])
    gram_b = jnp.einsum("l...ro,l...so->l...rs", x["b"], y["b"])
    return scales * jnp.sum(gram_a * gram_b, axis=tuple(range(1, gram_a.ndim)))


def inner(x: Adapter, y: Adapter) -> dict[str, Float[Array, "L"]]:
    """<x, y> of the weight changes, part by part and layer by layer, without building A B. Parts meet by name."""
    return {name: _product(x[name], y[name]) for name in x if name in y}


def between(x: Adapter, y: Adapter, t: Float[Array, ""] | float) -> Adapter:
    """(1 - t) x + t y, exactly: low-rank parts by setting their ranks side by side, the others by adding."""
    out: Adapter = {}
    for name in dict.fromkeys([*x, *y]):
        parts: Any = [(side[name], share) for side, share in ((x, 1 - t), (y, t)) if name in side]
        if len(parts) == 1:
            out |= rescale({name: parts[0][0]}, parts[0][1])
        elif "d" in parts[0][0]:
            out[name] = {"d": sum((share * part["d"] for part, share in parts), jnp.zeros(()))}
        else:
            out[name] = _side_by_side(parts)
    return out


def _side_by_side(parts: list[tuple[dict[str, Array], Any]]) -> dict[str, Array]:
    """sum_k share_k scale_k A_k B_k as one pair A, B of the ranks together; or the sum of vectors."""
    ones = jnp.ones_like(parts[0][0]["scale"])
    if "u" in parts[0][0]:
        return {"u": sum(s * p["scale"][:, None] * p["u"] for p, s in parts), "scale": ones}  # pyright: ignore
    b = [share * part["scale"].reshape(-1, *[1] * (part["b"].ndim - 1)) * part["b"] for part, share in parts]
    return {"a": jnp.concatenate([p["a"] for p, _ in parts], -1), "b": jnp.concatenate(b, -2), "scale": ones}


def _square_norm(target: dict[str, Array]) -> Float[Array, "L"]:
    """||scale A B||_F^2 per layer, or ||scale u||^2, or ||d||^2."""
    return _product(target, target)


def effective_norm(adapter: Adapter) -> Float[Array, ""]:
    """sqrt(sum over modules ||scale A B||_F^2), without building A B."""
    return jnp.sqrt(jnp.maximum(sum(jnp.sum(_square_norm(t)) for t in adapter.values()), 0.0))


def rescale(adapter: Adapter, factor: Float[Array, ""] | float) -> Adapter:
    """The same adapter with `factor` times its effect; only B (or u, or d) is touched."""
    return {
        name: {leaf: x * factor if leaf in LINEAR else x for leaf, x in target.items()}
        for name, target in adapter.items()
    }


def to_norm(adapter: Adapter, norm: Float[Array, ""] | float) -> Adapter:
    """Rescale to an effective norm."""
    own = effective_norm(adapter)
    return rescale(adapter, jnp.where(own > 0, norm / jnp.where(own > 0, own, 1.0), 0.0))


def random_like(adapter: Adapter, key: Array) -> Adapter:
    """A Gaussian adapter of the same shape whose effective norm equals the given one, module by module and layer by
    layer: the equal-norm control."""
    out: Adapter = {}
    for number, (name, target) in enumerate(adapter.items()):
        fresh = dict(target)
        for leaf_number, leaf in enumerate(x for x in DRAWN if x in target):
            leaf_key = jax.random.fold_in(jax.random.fold_in(key, number), leaf_number)
            fresh[leaf] = jax.random.normal(leaf_key, target[leaf].shape)
        ratio = jnp.sqrt(_square_norm(target) / jnp.maximum(_square_norm(fresh), 1e-30))
        last = next(leaf for leaf in LINEAR if leaf in fresh)
        fresh[last] = fresh[last] * ratio.reshape(-1, *[1] * (fresh[last].ndim - 1))
        out[name] = fresh
    return out


def merge(config: DecoderConfig, params: dict, adapter: Adapter) -> dict:
    """Weights with the low-rank updates added: W + scale A B. A steering vector has no place in W.

    Raises:
      BadInput: the adapter holds a steering vector.
    """
    if "vector" in adapter:
        raise BadInput("adapter: a steering vector cannot be merged into weights; export it as a control vector")
    layers = dict(params["layers"])
    for name, target in adapter.items():
        delta = jnp.einsum("l,l...ir,l...ro->l...io", target["scale"], target["a"], target["b"])
        layers[name] = {**layers[name], "w": layers[name]["w"].astype(delta.dtype) + delta}
    return {**params, "layers": layers}
