"""Which tokens of a packed batch belong to which response slot."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.types import Batch, Tap

Pool = Literal["mean", "last"]


def owners(batch: Batch) -> Int[Array, "B T"]:
    """The response slot that each token belongs to; R (one past the last slot) for prompts and padding."""
    R = batch.ids.shape[1]
    earlier = (batch.group[:, None, :] >= 0) & (batch.group[:, None, :] < batch.segments[:, :, None] - 1)
    base = jnp.sum(earlier, axis=-1)
    in_tree = (batch.segments > 0) & (batch.branches > 0)
    trained = jnp.zeros(batch.tokens.shape, bool)
    after = jnp.minimum(batch.index + 1, batch.tokens.shape[1] - 1)
    trained = jax.vmap(lambda row, at, w: row.at[at].max(w > 0))(trained, after, batch.weights)
    in_path = trained & (batch.branches == 0) & (batch.segments > 0)
    return jnp.where(in_tree, base + batch.branches - 1, jnp.where(in_path, base, R))


def asking(batch: Batch) -> Bool[Array, "B T"]:
    """The tokens from which a scored token is predicted and that belong to no response: the last of a prompt."""
    blank = jnp.zeros(batch.tokens.shape, bool)
    predicts = jax.vmap(lambda row, at, w: row.at[at].max(w > 0))(blank, batch.index, batch.weights)
    return predicts & (owners(batch) == batch.ids.shape[1])


def response_tokens(batch: Batch, n: int) -> Int[Array, "B R n"]:
    """The first n scored tokens of each response; -1 where it has fewer."""
    B, R = batch.ids.shape
    filled = jnp.asarray(batch.weights) > 0
    mine = filled[:, :, None] & (jnp.asarray(batch.response)[:, :, None] == jnp.arange(R))  # [B, N, R]
    place = jnp.cumsum(mine, axis=1) - 1
    at = mine[..., None] & (place[..., None] == jnp.arange(n))  # [B, N, R, n]
    found = jnp.einsum("bnri,bn->bri", at.astype(jnp.int32), jnp.asarray(batch.targets))
    return jnp.where(at.any(axis=1), found, -1)


def asked_last(batch: Batch) -> Int[Array, "B R"]:
    """The prompt token that each response follows; -1 in empty slots."""
    B, R = batch.ids.shape
    filled = jnp.asarray(batch.weights) > 0
    mine = filled[:, :, None] & (jnp.asarray(batch.response)[:, :, None] == jnp.arange(R))
    first = jnp.argmax(mine, axis=1)  # [B, R]
    at = jnp.take_along_axis(jnp.asarray(batch.index), first, axis=1)
    return jnp.where(mine.any(axis=1), jnp.take_along_axis(jnp.asarray(batch.tokens), at, axis=1), -1)


def pool_weights(batch: Batch, pool: Pool = "mean") -> Float[Array, "B T R"]:
    """Weight of every token in the value of each response slot: 1/n for each of its n tokens, or 1 for its last."""
    member = jax.nn.one_hot(owners(batch), batch.ids.shape[1])  # nothing for prompts and padding
    if pool == "last":
        return member * (jnp.cumsum(member[:, ::-1], axis=1)[:, ::-1] == 1)
    return member / jnp.maximum(member.sum(axis=1, keepdims=True), 1.0)


def response_means(batch: Batch, pool: Pool = "mean") -> Tap:
    """A tap: residual `[B, T, D]` -> its mean over each response's tokens, or the last one's, `[B, R, D]` float32."""
    weights = pool_weights(batch, pool)

    def tap(h: Float[Array, "B T D"]) -> Float[Array, "B R D"]:
        return jnp.einsum("btr,btd->brd", weights, h.astype(jnp.float32))

    return tap
