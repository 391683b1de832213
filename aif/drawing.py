"""Choosing a token from its logits: greedy, or drawn at a temperature from the tokens that top-k, top-p and min-p keep.

Every value may differ from row to row, and changing one compiles nothing again. All three filters keep the tokens at or
above some probability, so they are one threshold; it is found by bisection instead of sorting the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.errors import BadInput

ONE = 0x3F800000  # the bits of 1.0, as an integer: floats in [0, 1] are ordered as their bits are


class Drawing(NamedTuple):
    """How tokens are drawn, per row or for all rows: `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1
    keep all of them, `min_p` 0 too."""

    temperature: Float[Array, "#B"]
    top_k: Int[Array, "#B"]
    top_p: Float[Array, "#B"]
    min_p: Float[Array, "#B"]


Per = int | float | Sequence[int] | Sequence[float] | np.ndarray | Array  # a number, or one per row


def drawing(temperature: Per = 0.0, top_k: Per = 0, top_p: Per = 1.0, min_p: Per = 0.0) -> Drawing:
    """Checked values.

    Raises:
      BadInput: a value is out of its range, or a filter is set where nothing is drawn.
    """
    warm, k, p, least = (np.atleast_1d(np.asarray(x, np.float64)) for x in (temperature, top_k, top_p, min_p))
    if not (np.isfinite(warm) & (warm >= 0)).all():
        raise BadInput(f"temperature: {temperature} is not a temperature; give 0 for greedy, or a positive number")
    if not ((k >= 0) & (k == np.floor(k)) & (k < 2**31)).all():
        raise BadInput(f"top_k: {top_k} is no number of tokens; give 0 for all of them, or a positive whole number")
    if not ((p > 0) & (p <= 1)).all():
        raise BadInput(f"top_p: {top_p} is not within (0, 1]; give 1 to keep every token")
    if not ((least >= 0) & (least <= 1)).all():
        raise BadInput(f"min_p: {min_p} is not within [0, 1]; give 0 to keep every token")
    if (warm == 0).all() and ((k > 0).any() or (p < 1).any() or (least > 0).any()):
        raise BadInput("temperature: 0 draws nothing, so top_k, top_p and min_p do nothing; raise it or leave them out")
    return Drawing(*(jnp.asarray(x, kind) for x, kind in ((warm, "f4"), (k, "i4"), (p, "f4"), (least, "f4"))))


def draw(scores: Float[Array, "B V"], how: Drawing, keys: Array) -> Int[Array, "B"]:
    """A token per row from its logits; `keys [B]` decide the draws, row by row."""
    likeliest = jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        warm = scores / jnp.where(how.temperature > 0, how.temperature, 1.0)[:, None]
        p = jax.nn.softmax(warm, axis=-1)
        left = jnp.where(p >= threshold(p, how), warm, -jnp.inf)
        token = jax.vmap(jax.random.categorical)(keys, left).astype(jnp.int32)
        return jnp.where(how.temperature > 0, token, likeliest)

    return jax.lax.cond(jnp.any(how.temperature > 0), drawn, lambda: likeliest)


def threshold(p: Float[Array, "B V"], how: Drawing) -> Float[Array, "B 1"]:
    """The least probability that is kept, where p sums to 1 in every row.

    top-k: the k-th largest. top-p: the largest t with sum of p >= t at least `top_p` of what top-k keeps (Holtzman et
    al. 2020, section 3.1). min-p: `min_p` times the largest (Nguyen et al. 2024, eq. 2). Equal probabilities are kept
    or dropped together. The likeliest token always stays.
    """
    zero = jnp.zeros((len(p), 1))
    row = lambda x: jnp.broadcast_to(x[:, None], zero.shape)  # noqa: E731
    k, share = row(how.top_k), row(how.top_p)

    def kth() -> Array:
        found = _largest(lambda t: jnp.sum(p >= t, axis=-1, keepdims=True) >= k, len(p))
        return jnp.where(k > 0, found, zero)

    def nucleus(least: Array) -> Array:
        mass = lambda t: jnp.sum(jnp.where(p >= t, p, 0.0), axis=-1, keepdims=True)  # noqa: E731
        found = _largest(lambda t: mass(t) >= share * mass(least), len(p))
        return jnp.where(share < 1, jnp.maximum(found, least), least)

    least = jax.lax.cond(jnp.any(how.top_k > 0), kth, lambda: zero)
    least = jax.lax.cond(jnp.any(how.top_p < 1), nucleus, lambda x: x, least)
    return jnp.maximum(least, row(how.min_p) * jnp.max(p, axis=-1, keepdims=True))


def _largest(enough: Callable[[Array], Bool[Array, "B 1"]], rows: int) -> Float[Array, "B 1"]:
    """The largest float t in [0, 1] with `enough(t)`, exactly, where what holds at t holds below t too; 0 if none."""

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        holds = enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    ends = (jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), ONE + 1, jnp.int32))
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, ends)[0], jnp.float32)
