"""The one way to score a response: log-probabilities of its tokens, with the vocabulary head applied in chunks.

    ln p(y | x) = sum_t [ h_t . e_{y_t} - logsumexp_v(h_t . e_v) ]

Only hidden states that predict a scored token meet the head, `chunk` of them at a time, so `[B, T, V]` never exists.
With a frozen head the gradient with respect to h_t, e_{y_t} - sum_v p_v e_v, does not depend on what the loss does
with the log-probability; it is computed beside the forward pass and the logits are never built a second time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.batches import Dataset, once
from aif.models.decoder import Head
from aif.models.layers import product
from aif.policy import Policy
from aif.sharding import host, shared
from aif.types import Batch

CHUNK = 256


def token_logprobs(policy: Policy, batch: Batch, *, chunk: int = CHUNK) -> Float[Array, "B N"]:
    """ln p of every scored token of the batch, in nats; padding gives finite values to be masked by `weights`."""
    return score_hidden(policy(batch).hidden, policy.head, batch, chunk=chunk)


def score_hidden(hidden: Float[Array, "B T D"], head: Head, batch: Batch, *, chunk: int = CHUNK) -> Float[Array, "B N"]:
    """`token_logprobs` from hidden states that are at hand already."""
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    return gathered_logprobs(picked, head.weight, batch.targets, chunk * head.shared, head.cap)


def judged_tokens(
    policy: Policy, batch: Batch, *, chunk: int = CHUNK
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """`token_logprobs`, and whether each scored token is the likeliest where it stands; without a gradient."""
    hidden, head = policy(batch).hidden, policy.head
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    chunks = Chunks.of(batch.targets.shape, chunk * head.shared)

    def judge(xs: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = head(xs[0])
        return _pick(logits, xs[1]), jnp.argmax(logits, axis=1) == xs[1]

    logps, likeliest = jax.lax.map(judge, (chunks.split(picked), chunks.split(batch.targets)))
    return chunks.joined(logps), chunks.joined(likeliest)


def response_sums(values: Float[Array, "B N"], batch: Batch) -> Float[Array, "B R"]:
    """Sum over the scored tokens of each response slot; padding tokens count nothing."""
    R = batch.ids.shape[1]
    values = jnp.where(batch.weights > 0, values, 0.0)
    return jax.vmap(lambda v, r: jax.ops.segment_sum(v, r, num_segments=R))(values, batch.response)


def response_weights(batch: Batch) -> Float[Array, "B R"]:
    """What each response counts in the loss (its row's tier weight, 1 without tiers); 0 in empty slots."""
    mine = jax.nn.one_hot(batch.response, batch.ids.shape[1]) * (batch.weights > 0)[..., None]  # [B, N, R]
    return jnp.max(mine * batch.weights[..., None], axis=1)


def response_logprobs(policy: Policy, batch: Batch) -> Float[Array, "B R"]:
    """ln p(response | prompt) of every response slot, in nats; 0 in empty slots."""
    return response_sums(token_logprobs(policy, batch), batch)


_scored = jax.jit(response_logprobs)


def scores(policy: Policy, data: Dataset, *, rows: int) -> np.ndarray:
    """ln p of every response of a data set `[responses]`, in its order, nats."""
    found = np.zeros(len(data.owners))
    for batch in once(data, rows=rows, even=shared(policy.mesh)):
        filled = batch.ids >= 0
        found[batch.ids[filled]] = host(_scored(policy, batch))[filled]
    return found


def same_group(batch: Batch) -> Array:
    """`[B, R, R]`: whether two slots answer the same prompt; empty slots share nothing."""
    filled = batch.ids >= 0
    same = batch.group[:, :, None] == batch.group[:, None, :]
    return same & filled[:, :, None] & filled[:, None, :]


def group_logsumexp(values: Float[Array, "B R"], batch: Batch) -> Float[Array, "B R"]:
    """logsumexp over the responses to the same prompt, given to each of them; 0 in empty slots."""
    same = same_group(batch)
    masked = jnp.where(same, values[:, None, :], -jnp.inf)
    return jnp.where(batch.ids >= 0, jax.nn.logsumexp(masked, axis=-1, where=same), 0.0)


class Chunks(NamedTuple):
    """How positions `[*rows, N]` are taken `size` of every row at a time, so that rows which lie on several devices
    give work to all of them."""

    rows: tuple[int, ...]
    N: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], chunk: int) -> Chunks:
        """For positions of this shape, about `chunk` of them at a time."""
        return cls(shape[:-1], shape[-1], min(max(chunk // math.prod(shape[:-1]), 1), shape[-1]))

    def split(self, x: Float[Array, "..."] | Int[Array, "..."] | Bool[Array, "..."]) -> Array:
        """`[*rows, N, ...]` -> `[C, rows * size, ...]`, padded with zeros."""
        axis, end = len(self.rows), x.shape[len(self.rows) + 1 :]
        x = jnp.pad(x, [(0, -self.N % self.size if k == axis else 0) for k in range(x.ndim)])
        x = jnp.moveaxis(x.reshape(*self.rows, -1, self.size, *end), axis, 0)
        return x.reshape(len(x), -1, *end)

    def joined(self, x: Float[Array, "C M ..."] | Bool[Array, "C M ..."]) -> Array:
        """The inverse of `split`."""
        axis, end = len(self.rows), x.shape[2:]
        x = jnp.moveaxis(x.reshape(-1, *self.rows, self.size, *end), 0, axis)
        return x.reshape(*self.rows, -1, *end)[(slice(None),) * axis + (slice(self.N),)]


def _pick(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)


def _times_slope(x: Array, logits: Array, cap: float | None) -> Array:
    """x times d logit / d (h . e_v), which is 1 - (logit / cap)^2 where the head caps its logits, else 1."""
    return x if cap is None else x * (1 - jnp.square(logits / cap)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gathered_logprobs(
    hidden: Float[Array, "*rows N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*rows N"],
    chunk: int,
    cap: float | None = None,
) -> Float[Array, "*rows N"]:
    """ln softmax(capped(hidden head^T))[target], `chunk` hidden states at a time."""
    chunks = Chunks.of(targets.shape, chunk)
    score = lambda xs: _pick(Head(head, cap)(xs[0]), xs[1])  # noqa: E731
    return chunks.joined(jax.lax.map(score, (chunks.split(hidden), chunks.split(targets))))


def _forward(hidden, head, targets, chunk, cap):
    """Log-probabilities, and d logp / d hidden per token; a head that is trained is differentiated in `_backward`."""
    train_head = head.perturbed
    hidden, head, targets = hidden.value, head.value, targets.value
    chunks = Chunks.of(targets.shape, chunk)

    def score(xs):
        h, t = xs
        logits = Head(head, cap)(h)
        top = jnp.max(logits, axis=1, keepdims=True)
        tilt = jax.lax.optimization_barrier(jnp.exp(logits - top))  # taken once, for its sum and for the mean of e_v
        mass = jnp.sum(tilt, axis=1, keepdims=True)
        picked = jnp.take_along_axis(logits, t[:, None], axis=1)
        lse = top + jnp.log(mass)
        own = _times_slope(head[t].astype(h.dtype), picked, cap)
        mean = product(_times_slope(tilt, logits, cap).astype(h.dtype), head) / mass.astype(h.dtype)
        return (picked - lse)[:, 0], own - mean, lse[:, 0]

    logps, slope, lse = (chunks.joined(x) for x in jax.lax.map(score, (chunks.split(hidden), chunks.split(targets))))
    return logps, (slope, (hidden, head, targets, lse) if train_head else None)


def _backward(chunk, cap, residuals, cotangent):
    """d/d hidden = ct * slope; d/d head = sum_m ct_m (onehot_m - p_m) h_m^T, with the logits rebuilt chunk by chunk."""
    slope, kept = residuals
    d_hidden = cotangent[..., None].astype(slope.dtype) * slope
    if kept is None:
        return d_hidden, None, None
    hidden, head, targets, lse = kept
    chunks = Chunks.of(targets.shape, chunk)

    def add(total, xs):
        h, t, l, ct = xs
        logits = Head(head, cap)(h)
        weighted = -jnp.exp(logits - l[:, None]) * ct[:, None]
        weighted = _times_slope(weighted.at[jnp.arange(len(t)), t].add(ct), logits, cap)
        return total + jnp.einsum("mv,md->vd", weighted, h.astype(jnp.float32)), None

    xs = tuple(chunks.split(x) for x in (hidden, targets, lse, cotangent))
    d_head, _ = jax.lax.scan(add, jnp.zeros(head.shape, jnp.float32), xs)
    return d_hidden, d_head.astype(head.dtype), None


gathered_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
