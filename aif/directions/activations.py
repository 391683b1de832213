"""Residual activations per response, at every layer, in one forward pass over packed rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from aif.batches import Dataset, once
from aif.policy import Policy
from aif.slots import owners
from aif.types import Batch


class Activations(NamedTuple):
    """Mean residual over the tokens of each response, the tokens it was taken over, and the mean residual norm."""

    means: Float[np.ndarray, "N L D"]
    tokens: Int[np.ndarray, "N"]
    norms: Float[np.ndarray, "L"]


@jax.jit
def _means(policy: Policy, batch: Batch) -> tuple[Array, Array, Array]:
    R = batch.ids.shape[1]
    member = jax.nn.one_hot(owners(batch), R)  # [B, T, R]; nothing for tokens outside responses
    counts = member.sum(axis=1)
    inside = member.sum(axis=-1)

    def tap(h: Array) -> tuple[Array, Array]:
        h = h.astype(jnp.float32)
        sums = jnp.einsum("btr,btd->brd", member, h)
        return sums / jnp.maximum(counts, 1.0)[..., None], jnp.sum(inside * jnp.linalg.norm(h, axis=-1))

    means, norms = policy(batch, tap=tap).taps
    return means, norms, counts


def response_means(policy: Policy, data: Dataset, *, rows: int) -> Activations:
    """Mean residual after every block over the tokens of each response of the data set, in response order."""
    means, tokens, norms, ids = [], [], np.zeros(policy.config.layers), []
    for batch in once(data, rows=rows):
        m, n, c = _means(policy.replace(remat="none"), batch)
        filled = batch.ids >= 0
        means.append(np.asarray(m).transpose(1, 2, 0, 3)[filled])
        tokens.append(np.asarray(c)[filled])
        ids.append(batch.ids[filled])
        norms += np.asarray(n)
    order = np.argsort(np.concatenate(ids))
    counts = np.concatenate(tokens)[order]
    return Activations(np.concatenate(means)[order], counts.astype(np.int64), norms / counts.sum())
