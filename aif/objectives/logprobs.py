"""The one way to score a response: log-probabilities of its tokens, with the vocabulary head applied in chunks.

    ln p(y | x) = sum_t [ h_t . e_{y_t} - logsumexp_v(h_t . e_v) ]

Only hidden states that predict a scored token meet the head, `chunk` of them at a time, so `[B, T, V]` never exists.
With a frozen head the gradient with respect to h_t, e_{y_t} - sum_v p_v e_v, does not depend on what the loss does
with the log-probability; it is computed beside the forward pass and the logits are never built a second time.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.batches import Dataset, once
from aif.models.decoder import Head
from aif.policy import Policy
from aif.types import Batch

CHUNK = 256


def token_logprobs(policy: Policy, batch: Batch, *, chunk: int = CHUNK) -> Float[Array, "B N"]:
    """ln p of every scored token of the batch, in nats; padding gives finite values to be masked by `weights`."""
    return score_hidden(policy(batch).hidden, policy.head, batch, chunk=chunk)


def score_hidden(hidden: Float[Array, "B T D"], head: Head, batch: Batch, *, chunk: int = CHUNK) -> Float[Array, "B N"]:
    """`token_logprobs` from hidden states that are at hand already."""
    flat, targets = _asked(hidden, batch)
    logps: Array = gathered_logprobs(flat, head.weight, targets, chunk, head.cap)
    return logps.reshape(batch.targets.shape)


def _asked(hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, "M D"], Int[Array, "M"]]:
    """The hidden states that predict scored tokens, and those tokens, as flat lists."""
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    return picked.reshape(-1, hidden.shape[-1]), batch.targets.reshape(-1)


def judged_tokens(
    policy: Policy, batch: Batch, *, chunk: int = CHUNK
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """`token_logprobs`, and whether each scored token is the likeliest where it stands; without a gradient."""
    hidden, targets = _asked(policy(batch).hidden, batch)

    def judge(xs: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = policy.head(xs[0])
        return _pick(logits, xs[1]), jnp.argmax(logits, axis=1) == xs[1]

    size = min(chunk, len(hidden))
    judged = jax.lax.map(judge, (_chunks(hidden, size), _chunks(targets, size)))
    logps, likeliest = (x.reshape(-1)[: len(hidden)].reshape(batch.targets.shape) for x in judged)
    return logps, likeliest


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
    for batch in once(data, rows=rows):
        filled = batch.ids >= 0
        found[batch.ids[filled]] = np.asarray(_scored(policy, batch))[filled]
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


def _chunks(x: Array, chunk: int) -> Array:
    """`[M, ...]` -> `[C, chunk, ...]`, padded with zeros."""
    short = -len(x) % chunk
    return jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])


def _pick(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)


def _times_slope(x: Array, logits: Array, cap: float | None) -> Array:
    """x times d logit / d (h . e_v), which is 1 - (logit / cap)^2 where the head caps its logits, else 1."""
    return x if cap is None else x * (1 - jnp.square(logits / cap)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gathered_logprobs(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "M"],
    chunk: int,
    cap: float | None = None,
) -> Float[Array, "M"]:
    """ln softmax(capped(hidden head^T))[target] for a flat list of hidden states."""
    chunk = min(chunk, len(hidden))
    score = lambda xs: _pick(Head(head, cap)(xs[0]), xs[1])  # noqa: E731
    return jax.lax.map(score, (_chunks(hidden, chunk), _chunks(targets, chunk))).reshape(-1)[: len(hidden)]


def _forward(hidden, head, targets, chunk, cap):
    """Log-probabilities, and d logp / d hidden per token; a head that is trained is differentiated in `_backward`."""
    train_head = head.perturbed
    hidden, head, targets = hidden.value, head.value, targets.value
    size = min(chunk, len(hidden))

    def score(xs):
        h, t = xs
        logits = Head(head, cap)(h)
        top = jnp.max(logits, axis=1, keepdims=True)
        tilt = jax.lax.optimization_barrier(jnp.exp(logits - top))  # taken once, for its sum and for the mean of e_v
        mass = jnp.sum(tilt, axis=1, keepdims=True)
        picked = jnp.take_along_axis(logits, t[:, None], axis=1)
        lse = top + jnp.log(mass)
        own = _times_slope(head[t].astype(h.dtype), picked, cap)
        mean = _times_slope(tilt, logits, cap).astype(h.dtype) @ head.astype(h.dtype) / mass.astype(h.dtype)
        return (picked - lse)[:, 0], own - mean, lse[:, 0]

    logps, slope, lse = jax.lax.map(score, (_chunks(hidden, size), _chunks(targets, size)))
    flat = lambda x: x.reshape(-1, *x.shape[2:])[: len(hidden)]  # noqa: E731
    kept = (hidden, head, targets, flat(lse)) if train_head else None
    return flat(logps), (flat(slope), kept)


def _backward(chunk, cap, residuals, cotangent):
    """d/d hidden = ct * slope; d/d head = sum_m ct_m (onehot_m - p_m) h_m^T, with the logits rebuilt chunk by chunk."""
    slope, kept = residuals
    d_hidden = cotangent[:, None].astype(slope.dtype) * slope
    if kept is None:
        return d_hidden, None, None
    hidden, head, targets, lse = kept
    size = min(chunk, len(hidden))

    def add(total, xs):
        h, t, l, ct = xs
        logits = Head(head, cap)(h)
        weighted = -jnp.exp(logits - l[:, None]) * ct[:, None]
        weighted = _times_slope(weighted.at[jnp.arange(len(t)), t].add(ct), logits, cap)
        return total + jnp.einsum("mv,md->vd", weighted, h.astype(jnp.float32)), None

    xs = tuple(_chunks(x, size) for x in (hidden, targets, lse, cotangent))
    d_head, _ = jax.lax.scan(add, jnp.zeros(head.shape, jnp.float32), xs)
    return d_hidden, d_head.astype(head.dtype), None


gathered_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
