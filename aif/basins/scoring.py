"""Per-row losses and divergences of a policy: what every basin metric is made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aif.batches import Dataset, once
from aif.models.decoder import logits
from aif.objectives.logprobs import response_sums, token_logprobs
from aif.policy import Policy
from aif.types import Adapter, Batch

CHUNK = 128  # positions whose two full next-token distributions are held at a time


@jax.jit
def _response_losses(policy: Policy, batch: Batch) -> tuple[Array, Array]:
    return -response_sums(token_logprobs(policy, batch), batch), response_sums(jnp.ones_like(batch.weights), batch)


def losses(policy: Policy, data: Dataset, *, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(- ln p summed over its tokens, number of tokens) of every response of the data set, nats."""
    found = [(*_response_losses(policy, batch), batch.ids) for batch in once(data, rows=rows)]
    return _in_order(found)


def grid_losses(base: Policy, adapters: list[Adapter], data: Dataset, *, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`losses` for several adapters of one shape: sums `[responses, adapters]`, tokens `[responses]`."""
    columns = [losses(base.replace(adapter=adapter), data, rows=rows) for adapter in adapters]
    return np.stack([sums for sums, _ in columns], axis=1), columns[0][1]


def _in_order(found: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([i[i >= 0] for *_, i in found])
    first, second = (np.concatenate([np.asarray(f[k])[f[-1] >= 0] for f in found]) for k in (0, 1))
    order = np.argsort(ids)
    return first[order].astype(np.float64), second[order].astype(np.float64)


@jax.jit
def _hidden(policy: Policy, batch: Batch) -> Array:
    return policy(batch).hidden


@jax.jit
def _divergence(policy: Policy, reference: Policy, reference_hidden: Array, batch: Batch) -> tuple[Array, Array]:
    hidden = policy(batch).hidden
    pick = lambda h: jnp.take_along_axis(h, batch.index[..., None], axis=1)  # noqa: E731
    pairs = jnp.stack([pick(reference_hidden), pick(hidden)])  # [2, B, N, D]
    _, B, N, D = pairs.shape
    flat = pairs.reshape(2, B * N, D)
    short = -(B * N) % CHUNK
    chunks = jnp.pad(flat, ((0, 0), (0, short), (0, 0))).reshape(2, -1, CHUNK, D).swapaxes(0, 1)

    def kl(pair: Array) -> Array:
        heads = (reference.params, policy.params)
        log_p, log_q = (jax.nn.log_softmax(logits(p, h), axis=-1) for p, h in zip(heads, pair, strict=True))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    per_token = jax.lax.map(kl, chunks).reshape(-1)[: B * N].reshape(B, N)
    return response_sums(per_token, batch), response_sums(jnp.ones_like(batch.weights), batch)


def divergences(
    reference: Policy, policies: list[Policy], data: Dataset, *, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || policy) of the next token, full vocabulary, summed over the scored tokens of every response:
    `[responses, policies]` in nats, and tokens `[responses]`. The reference runs once."""
    columns: list[list[tuple]] = [[] for _ in policies]
    for batch in once(data, rows=rows):
        hidden = _hidden(reference, batch)
        for column, policy in zip(columns, policies, strict=True):
            column.append((*_divergence(policy, reference, hidden, batch), batch.ids))
    done = [_in_order(column) for column in columns]
    return np.stack([sums for sums, _ in done], axis=1), done[0][1]
