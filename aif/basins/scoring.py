"""Per-row losses and divergences: what every basin metric is made of.

A *family* turns a point (a norm, a noise level) into an adapter; a whole grid of points over the whole data set is one
compiled program, and other values of the family's arrays compile nothing again. On a CPU the points follow one another
(one adapter's products fill the machine already, stacked adapters only cost cache); elsewhere they run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from aif.adapter import changed
from aif.batches import Dataset, once
from aif.models.decoder import Head
from aif.objectives.logprobs import Chunks, Cut, response_sums, token_logprobs, vocabulary_kl
from aif.policy import Policy
from aif.sharding import host, shared
from aif.types import Adapter, Batch, as_partial

AT_A_TIME = 2048  # tokens of a batch, at least: without a backward pass memory allows it, and long GEMMs pay
Family = Callable[[Any], Adapter]


def carrying(base: Policy, adapter: Adapter | None) -> Policy:
    """The base policy with a solution: its adapter beside the weights, whole weight changes added to them."""
    if adapter is None:
        return base.replace(adapter=None)
    params, beside = changed(base.params, adapter)
    return base.replace(params=params, adapter=beside)


def losses(policy: Policy, data: Dataset, *, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(- ln p summed over its tokens, number of tokens) of every response of the data set, nats."""
    batches = stacked(data, rows, shared(policy.mesh))
    return in_order(batches.ids, _losses(policy, batches)), in_order(batches.ids, _tokens(batches))


def grid_losses(
    base: Policy, family: Family, points: Any, data: Dataset, *, rows: int
) -> tuple[Float[np.ndarray, "N P"], Float[np.ndarray, "N"]]:
    """`losses` of base + family(point) at every point: sums `[responses, points]`, tokens `[responses]`.

    Args:
      family: a function, or a `Partial` that binds arrays; point -> adapter.
      points: array or pytree of arrays, `[P, ...]`.
    """
    batches = stacked(data, rows, shared(base.mesh))
    sums = _grid_losses(base, as_partial(family), points, batches, together=together())
    return in_order(batches.ids, sums), in_order(batches.ids, _tokens(batches))


def divergences(
    reference: Policy, policies: Sequence[Policy], data: Dataset, *, rows: int
) -> tuple[Float[np.ndarray, "N P"], Float[np.ndarray, "N"]]:
    """KL(reference || policy) of the next token, full vocabulary, summed over the scored tokens of every response:
    `[responses, policies]` in nats, and tokens `[responses]`."""
    batches = stacked(data, rows, shared(reference.mesh))
    columns = [_divergences(policy, reference, batches) for policy in policies]
    return in_order(batches.ids, np.stack([host(c) for c in columns])), in_order(batches.ids, _tokens(batches))


def grid_divergences(
    base: Policy, families: Sequence[Family], points: Sequence[Any], data: Dataset, *, rows: int
) -> tuple[list[Float[np.ndarray, "N P"]], Float[np.ndarray, "N"]]:
    """`divergences` of base + family(point) from the base, for each family with its points."""
    batches = stacked(data, rows, shared(base.mesh))
    run = partial(_grid_divergences, base, batches=batches, together=together())
    found = [run(as_partial(f), p) for f, p in zip(families, points, strict=True)]
    return [in_order(batches.ids, sums) for sums in found], in_order(batches.ids, _tokens(batches))


def together() -> bool:
    """Whether points run side by side: everywhere but on a CPU."""
    return jax.default_backend() != "cpu"


def stacked(data: Dataset, rows: int, even: int = 1) -> Batch:
    """The whole data set as batches of one shape, `[batches, B, ...]` with B a multiple of `even`, with the least
    padding that this allows."""
    found = jax.tree.map(lambda *x: np.concatenate(x), *once(data, rows=rows))
    filled = np.asarray(found.segments).any(axis=1)
    n, T = int(filled.sum()), found.tokens.shape[1]
    count = -(-n * T // max(rows * data.length, AT_A_TIME))
    B = -(-n // (count * even)) * even

    def shaped(path: tuple, x: np.ndarray) -> np.ndarray:
        blank = -1 if path[0].name in ("group", "ids") else 0
        spare = np.full((count * B - n, *x.shape[1:]), blank, x.dtype)
        return np.concatenate([x[filled], spare]).reshape(count, B, *x.shape[1:])

    return jax.tree_util.tree_map_with_path(shaped, found)


def in_order(ids: Any, values: Any) -> np.ndarray:
    """Values per response slot, `[..., batches, B, R]`, by response number: `[responses, ...]` float64."""
    ids = np.asarray(ids)
    filled = ids >= 0
    flat = host(values).astype(np.float64)[..., filled]
    return np.moveaxis(flat[..., np.argsort(ids[filled])], -1, 0)


def _tokens(batches: Batch) -> np.ndarray:
    return np.asarray(jax.vmap(lambda b: response_sums(jnp.ones_like(b.weights), b))(batches))


@jax.jit
def _losses(policy: Policy, batches: Batch) -> Array:
    return jax.lax.map(lambda batch: -response_sums(token_logprobs(policy, batch), batch), batches)


@partial(jax.jit, static_argnames="together")
def _grid_losses(base: Policy, family: Any, points: Any, batches: Batch, *, together: bool) -> Array:
    at = lambda point: _losses(carrying(base, family(point)), batches)  # noqa: E731
    return _over(at, points, together)


def _scored(policy: Policy, batch: Batch) -> Array:
    """Residuals that predict a scored token, `[B * N, D]`."""
    picked = jnp.take_along_axis(policy(batch).hidden, batch.index[..., None], axis=1)
    return picked.reshape(-1, picked.shape[-1])


@jax.jit
def _divergences(policy: Policy, reference: Policy, batches: Batch) -> Array:
    at = lambda batch: (_scored(reference, batch), _scored(policy, batch)[None])  # noqa: E731
    return jax.lax.map(lambda batch: _kl(reference.head, policy.head, *at(batch), batch)[0], batches)


@partial(jax.jit, static_argnames="together")
def _grid_divergences(base: Policy, family: Any, points: Any, batches: Batch, *, together: bool) -> Array:
    """`[P, batches, B, R]`; the reference's distribution is made once for all points, unless they move the head."""
    policy = lambda k: carrying(base, family(jax.tree.map(lambda x: x[k], points)))  # noqa: E731
    count = jnp.arange(len(jax.tree.leaves(points)[0]))

    def one(batch: Batch) -> Array:
        rest = _scored(base, batch)
        if policy(0).params is base.params:
            return _kl(base.head, base.head, rest, _over(lambda k: _scored(policy(k), batch), count, together), batch)

        def apart(k: Array) -> Array:
            return _kl(base.head, policy(k).head, rest, _scored(policy(k), batch)[None], batch)[0]

        return jax.lax.map(apart, count)

    return jnp.moveaxis(jax.lax.map(one, batches), 0, 1)


def _over(at: Callable[[Any], Array], points: Any, together: bool) -> Array:
    return jax.vmap(at)(points) if together else jax.lax.map(at, points)


def _kl(head_p: Head, head_q: Head, p: Array, q: Array, batch: Batch) -> Float[Array, "P B R"]:
    """KL of the next token, summed over each response, from the scored residuals `[M, D]` and `[P, M, D]`."""
    cut = Cut.of(head_p, len(p))
    chunks = Chunks.of((len(p),), cut.positions)
    pairs = (chunks.split(p), jax.vmap(chunks.split, out_axes=1)(q))
    found = jax.lax.map(lambda pair: vocabulary_kl(pair[0], head_p, pair[1], head_q, cut.tile), pairs)
    per_token = jax.vmap(chunks.joined, in_axes=1)(found)
    return jax.vmap(lambda x: response_sums(x.reshape(batch.index.shape), batch))(per_token)
