"""Residual activations per response, at every layer, in one forward pass over packed rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from aif.batches import Dataset, once
from aif.errors import BadInput
from aif.policy import Policy
from aif.sharding import host, shared
from aif.slots import Pool, owners, pool_weights
from aif.types import Batch


class Activations(NamedTuple):
    """Mean residual over the tokens of each response (or that of its last token), the number of its tokens, and the
    mean residual norm over the tokens of all responses."""

    means: Float[np.ndarray, "N L D"]
    tokens: Int[np.ndarray, "N"]
    norms: Float[np.ndarray, "L"]


@partial(jax.jit, static_argnames="pool")
def _means(policy: Policy, batch: Batch, pool: Pool) -> tuple[Array, Array, Array]:
    R = batch.ids.shape[1]
    member = jax.nn.one_hot(owners(batch), R)  # [B, T, R]; nothing for tokens outside responses
    weights, inside = pool_weights(batch, pool), member.sum(axis=-1)

    def tap(h: Array) -> tuple[Array, Array]:
        h = h.astype(jnp.float32)
        return jnp.einsum("btr,btd->brd", weights, h), jnp.sum(inside * jnp.linalg.norm(h, axis=-1))

    means, norms = policy(batch, tap=tap).taps
    return means, norms, member.sum(axis=1)


def response_means(policy: Policy, data: Dataset, *, rows: int, pool: Pool = "mean") -> Activations:
    """Residual after every block, pooled over the tokens of each response of the data set, in response order.

    `pool` is "mean" over all tokens of a response, or "last": its last token alone.
    """
    means, tokens, norms, ids = [], [], np.zeros(policy.config.layers), []
    for batch in once(data, rows=rows, even=shared(policy.mesh)):
        m, n, c = _means(policy.replace(remat="none"), batch, pool)
        filled = batch.ids >= 0
        m, n, c = (host(x) for x in (m, n, c))
        means.append(m.transpose(1, 2, 0, 3)[filled])
        tokens.append(c[filled])
        ids.append(batch.ids[filled])
        norms += n
    order = np.argsort(np.concatenate(ids))
    counts = np.concatenate(tokens)[order]
    return Activations(np.concatenate(means)[order], counts.astype(np.int64), norms / counts.sum())


def check_classes(activations: Activations, positive: np.ndarray) -> None:
    """Refuse what no direction can be made from.

    Raises:
      BadInput: a class is empty (all labels are equal), or an activation is not finite.
    """
    if positive.all() or not positive.any():
        raise BadInput("direction: one of the two classes has no response; check corpus.target and the stances")
    if not np.isfinite(activations.means).all():
        raise BadInput("direction: an activation is not finite; check the model's weights and the compute dtype")
