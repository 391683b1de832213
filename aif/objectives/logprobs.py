"""The one way to score a response: log-probabilities of its tokens, with the vocabulary head applied piece by piece.

    ln p(y | x) = sum_t [ h_t . e_{y_t} - logsumexp_v(h_t . e_v) ]

Only hidden states that predict a scored token meet the head, some positions and a tile of the vocabulary at a time
(`Cut`), so `[B, T, V]` never exists and what does stays in cache. Sums over the vocabulary are taken online, against
the greatest logit seen so far (Milakov & Gimelshein 2018, algorithm 3). With a frozen head the gradient with respect
to h_t, e_{y_t} - sum_v p_v e_v, does not depend on what the loss does with the log-probability; it is computed beside
the forward pass and the logits are never built a second time.
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
from aif.models.layers import capped
from aif.policy import Policy
from aif.sharding import host, shared
from aif.types import Batch

POSITIONS = 2048  # hidden states that meet the head at a time, at most
LOGITS = 2**21  # logits that are held at a time, about
TILE = 1024  # rows of the head in a tile, at least about
FEW = 256  # hidden states that meet a head which is not cut


class Cut(NamedTuple):
    """How many hidden states meet how many rows of the head at a time."""

    positions: int
    tile: int

    @classmethod
    def of(cls, head: Head, positions: int) -> Cut:
        """For so many positions: tiles divide the vocabulary evenly. A head whose rows lie on several devices stays
        whole, and fewer positions meet it."""
        V = head.weight.shape[0]
        wish = max(LOGITS // max(min(positions // head.shared, POSITIONS), 1), TILE)
        tiles = [V // n for n in range(1, V // TILE + 1) if V % n == 0 and V // n > TILE // 2] or [V]
        tile = V if head.whole else min(tiles, key=lambda tile: abs(math.log(tile / wish)))
        return cls(min(max(LOGITS // tile, FEW), POSITIONS) * head.shared, tile)


def token_logprobs(policy: Policy, batch: Batch) -> Float[Array, "B N"]:
    """ln p of every scored token of the batch, in nats; padding gives finite values to be masked by `weights`."""
    return score_hidden(policy(batch).hidden, policy.head, batch)


def score_hidden(hidden: Float[Array, "B T D"], head: Head, batch: Batch) -> Float[Array, "B N"]:
    """`token_logprobs` from hidden states that are at hand already."""
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    cut = Cut.of(head, math.prod(batch.targets.shape))
    return gathered_logprobs(picked, head.weight, batch.targets, cut, head.cap)


def judged_tokens(policy: Policy, batch: Batch) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """`token_logprobs`, and whether each scored token is the likeliest where it stands; without a gradient."""
    hidden, head = policy(batch).hidden, policy.head
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    chunks = Chunks.of(batch.targets.shape, FEW * head.shared)

    def judge(xs: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = head(xs[0])
        picked = jnp.take_along_axis(logits, xs[1][:, None], axis=1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == xs[1]

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


class Seen(NamedTuple):
    """The softmax over what was seen of the vocabulary: its greatest logit, and sum_v exp(logit_v - greatest)."""

    top: Float[Array, "*points M"]
    mass: Float[Array, "*points M"]

    @classmethod
    def nothing(cls, positions: int) -> Seen:
        return cls(jnp.full(positions, -jnp.inf), jnp.zeros(positions))

    def with_tile(self, logits: Float[Array, "M K"]) -> tuple[Seen, Float[Array, "M K"], Float[Array, "M"]]:
        """What is seen with a further tile; exp(logits - greatest); what sums over the earlier tiles count now."""
        top = jax.lax.stop_gradient(jnp.maximum(self.top, jnp.max(logits, axis=1)))
        tilt, decay = jnp.exp(logits - top[:, None]), jnp.exp(self.top - top)
        return Seen(top, self.mass * decay + jnp.sum(tilt, axis=1)), tilt, decay

    @property
    def lse(self) -> Float[Array, "*points M"]:
        """logsumexp of the logits, nats."""
        return self.top + jnp.log(self.mass)


def vocabulary_kl(
    p: Float[Array, "M D"], head_p: Head, q: Float[Array, "P M D"], head_q: Head, tile: int
) -> Float[Array, "P M"]:
    """KL(softmax(head_p(p)) || softmax(head_q(q_k))) of every k and position, nats, a tile of the vocabulary at a time:

    sum_v p_v (z_v - y_v) + logsumexp(y) - logsumexp(z), with z and y the logits of p and of q_k.
    """
    P, M, D = q.shape

    @jax.checkpoint
    def step(seen: tuple[Seen, Seen, Array], weights: tuple[Array, Array]) -> tuple[tuple[Seen, Seen, Array], None]:
        of_p, of_q, mixed = seen
        z = jax.lax.optimization_barrier(Head(weights[0], head_p.cap)(p))
        of_p, tilt, decay = of_p.with_tile(z)

        def other(one: tuple[Array, Seen, Array]) -> tuple[Seen, Array]:
            y = jax.lax.optimization_barrier(Head(weights[1], head_q.cap)(one[0]))
            return one[1].with_tile(y)[0], one[2] * decay + jnp.sum(tilt * (z - y), axis=1)

        return (of_p, *jax.lax.map(other, (q, of_q, mixed))), None

    blank = Seen.nothing(M)
    start = (blank, jax.tree.map(lambda x: jnp.broadcast_to(x, (P, M)), blank), jnp.zeros((P, M)))
    tiles = (_tiles(head_p.weight, tile), _tiles(head_q.weight, tile))
    (of_p, of_q, mixed), _ = jax.lax.scan(step, start, tiles)
    return mixed / of_p.mass + of_q.lse - of_p.lse


def _tiles(weight: Float[Array, "V D"], tile: int) -> Float[Array, "C K D"]:
    return weight.reshape(-1, tile, weight.shape[1])


def _times_slope(x: Array, logits: Array, cap: float | None) -> Array:
    """x times d logit / d (h . e_v), which is 1 - (logit / cap)^2 where the head caps its logits, else 1."""
    return x if cap is None else x * (1 - jnp.square(logits / cap)).astype(x.dtype)


def _own(hidden: Float[Array, "M D"], head: Float[Array, "V D"], targets: Int[Array, "M"], cap: float | None) -> Array:
    """The logit of every position's own target."""
    return capped(jnp.sum(hidden * head[targets].astype(hidden.dtype), axis=1, dtype=jnp.float32), cap)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gathered_logprobs(
    hidden: Float[Array, "*rows N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*rows N"],
    cut: Cut,
    cap: float | None = None,
) -> Float[Array, "*rows N"]:
    """ln softmax(capped(hidden head^T))[target], nats."""
    chunks = Chunks.of(targets.shape, cut.positions)

    def score(xs: tuple[Array, Array]) -> Array:
        h, t = xs
        seen, _ = jax.lax.scan(
            lambda seen, weight: (seen.with_tile(Head(weight, cap)(h))[0], None),
            Seen.nothing(len(t)),
            _tiles(head, cut.tile),
        )
        return _own(h, head, t, cap) - seen.lse

    return chunks.joined(jax.lax.map(score, (chunks.split(hidden), chunks.split(targets))))


def _forward(hidden, head, targets, cut, cap):
    """Log-probabilities, and d logp / d hidden per token; a head that is trained is differentiated in `_backward`."""
    train_head = head.perturbed
    hidden, head, targets = hidden.value, head.value, targets.value
    chunks = Chunks.of(targets.shape, cut.positions)

    def score(xs):
        h, t = xs

        def step(carry, weight):
            seen, total = carry
            logits = Head(weight, cap)(h)
            seen, tilt, decay = seen.with_tile(logits)
            tilt = jax.lax.optimization_barrier(tilt)  # taken once, for its sum and for the mean of e_v
            tilt = _times_slope(tilt, logits, cap).astype(h.dtype)
            total = total * decay[:, None] + jnp.dot(tilt, weight.astype(h.dtype), preferred_element_type=jnp.float32)
            return (seen, total), None

        start = (Seen.nothing(len(t)), jnp.zeros(h.shape, jnp.float32))
        (seen, total), _ = jax.lax.scan(step, start, _tiles(head, cut.tile))
        picked = _own(h, head, t, cap)
        slope = _times_slope(head[t].astype(jnp.float32), picked[:, None], cap) - total / seen.mass[:, None]
        return picked - seen.lse, slope.astype(h.dtype), seen.lse

    logps, slope, lse = (chunks.joined(x) for x in jax.lax.map(score, (chunks.split(hidden), chunks.split(targets))))
    return logps, (slope, (hidden, head, targets, lse) if train_head else None)


def _backward(cut, cap, residuals, cotangent):
    """d/d hidden = ct * slope; d/d head = sum_m ct_m (onehot_m - p_m) h_m^T, with the logits rebuilt piece by piece."""
    slope, kept = residuals
    d_hidden = cotangent[..., None].astype(slope.dtype) * slope
    if kept is None:
        return d_hidden, None, None
    hidden, head, targets, lse = kept
    chunks = Chunks.of(targets.shape, cut.positions)
    xs = tuple(chunks.split(x) for x in (hidden, targets, lse, cotangent))

    def of_tile(tile):
        weight, first = tile
        rows = first + jnp.arange(cut.tile)

        def add(total, x):
            h, t, l, ct = x
            logits = Head(weight, cap)(h)
            weighted = jnp.where(t[:, None] == rows, 1.0, 0.0) - jnp.exp(logits - l[:, None])
            weighted = _times_slope(weighted * ct[:, None], logits, cap)
            return total + jnp.einsum("mv,md->vd", weighted, h.astype(jnp.float32)), None

        return jax.lax.scan(add, jnp.zeros(weight.shape, jnp.float32), xs)[0]

    d_head = jax.lax.map(of_tile, (_tiles(head, cut.tile), jnp.arange(0, len(head), cut.tile)))
    return d_hidden, d_head.reshape(head.shape).astype(head.dtype), None


gathered_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
