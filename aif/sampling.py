"""Generation with a key-value cache, adapters and edits.

Prompts are padded on the left to a common length, read once, and continued one token at a time inside one compiled
loop that ends when every row has stopped. Several samples of a prompt share its reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from aif.drawing import Per, draw, drawing
from aif.errors import BadInput
from aif.models.decoder import Cache, apart, empty_cache, forward
from aif.policy import Policy
from aif.sharding import by_rows, everywhere
from aif.sharding import rows as sharded
from aif.steering import reach, reached
from aif.types import Edits, Reach

BUCKET = 32  # the least length that prompts and answers are padded to


class Generated(NamedTuple):
    """New tokens `[B, n]`, their log-probabilities under the sampling policy at temperature 1 with no filter, and
    lengths `[B]` (the stop token included; what follows is padding)."""

    tokens: Int[Array, "B n"]
    logps: Float[Array, "B n"]
    lengths: Int[Array, "B"]


def bucket(length: int) -> int:
    """The smallest of 32, 64, 96, 128, 192, 256, 384, 512, ... that holds `length` tokens: prompts and answers are
    padded to it, which bounds the number of compilations by the logarithm of the longest."""
    sizes = chain([BUCKET], ((m * BUCKET) << k for k in count() for m in (2, 3)))
    return next(size for size in sizes if size >= length)


def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop: int | Sequence[int],
    samples: int = 1,
    temperature: Per = 0.0,
    top_k: Per = 0,
    top_p: Per = 1.0,
    min_p: Per = 0.0,
    key: Array | None = None,
) -> Generated:
    """Continue each prompt by up to `new_tokens` tokens, `samples` times; temperature 0 is greedy.

    Rows are prompt by prompt, the samples of one beside each other. The policy's edits have a row for all prompts or
    one each, and act where its `reach` says; the first generated token is predicted from the last prompt token, which
    is a prompt token.

    Args:
      stop: the token that ends an answer, or several; what follows the end is filled with the first of them.
      temperature, top_k, top_p, min_p: numbers, or one per row; see `aif.drawing`.
      key: row b draws with `fold_in(key, b)`; or an array of a key per row. What a row draws depends on its key alone.

    Raises:
      BadInput: no prompt, an empty prompt, nothing to generate, or a value or position that is out of its range.
    """
    if not prompts or min(map(len, prompts)) < 1 or new_tokens < 1 or samples < 1:
        raise BadInput("generate: give at least one prompt of one token, and ask for at least one token and sample")
    rows, width = len(prompts) * samples, bucket(max(map(len, prompts)))
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    key = jax.random.key(0) if key is None else key
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows)) if key.ndim == 0 else key
    stops = np.atleast_1d(np.asarray(stop, np.int32))
    stops = np.pad(stops, (0, -len(stops) % 4), mode="edge")
    how = drawing(temperature, top_k, top_p, min_p)
    made = _generate(
        policy.replace(remat="none", reach=_within(policy.reach, min(map(len, prompts)) + new_tokens)),
        tokens,
        segments,
        (stops, how, keys, np.int32(new_tokens)),
        room=bucket(new_tokens),
        samples=samples,
        unrolled=unrolled(),
    )
    return Generated(made.tokens[:, :new_tokens], made.logps[:, :new_tokens], made.lengths)


def _within(named: Reach | None, shortest: int) -> Reach:
    """Where the edits act; everywhere for None."""
    named = reach("all") if named is None else named
    beyond = [int(start) for start, _ in np.asarray(named.spans) if start >= shortest]
    if beyond:
        raise BadInput(
            f"scope: position {beyond[0]} is out of range; the shortest text has positions 0..{shortest - 1}"
        )
    return named


def unrolled() -> bool:
    """Whether layers are decoded one by one from weights that are `apart`. A scan would copy each layer's weights at
    every token on CPU, which takes as long as the products themselves; elsewhere it reads them where they are."""
    return jax.default_backend() == "cpu"


@partial(jax.jit, static_argnames=("room", "samples", "unrolled"))
def _generate(policy, tokens, segments, how, *, room, samples, unrolled):
    stops, chances, keys, new_tokens = how
    P, rows = tokens.shape[1], len(tokens) * samples
    tokens, segments, policy = *by_rows((tokens, segments), policy.mesh), policy.gathered
    first, cache, starts = _read(policy, tokens, segments, room=room, samples=samples)
    policy = policy.replace(edits=_rows(policy.edits, samples))
    if unrolled:
        policy, cache = _apart(policy, cache)

    def choose(scores, step, done):
        token = draw(scores, chances, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys))
        logp = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(scores, axis=1)
        token, logp = jnp.where(done, stops[0], token), jnp.where(done, 0.0, logp)
        return token, logp, done | jnp.any(token[:, None] == stops, axis=1)

    def body(carry):
        step, cache, done, tokens, logps = carry
        position = (P + step - 1 - starts)[:, None]
        last = jax.lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
        ones = jnp.ones((rows, 1), jnp.int32)
        scores, cache = _run(policy, last, position, P - starts, ones, cache)
        token, logp, done = choose(scores, step, done)
        return step + 1, cache, done, tokens.at[:, step].set(token), logps.at[:, step].set(logp)

    token, logp, done = choose(first, 0, jnp.zeros(rows, bool))
    made = jnp.full((rows, room), stops[0]).at[:, 0].set(token), jnp.zeros((rows, room)).at[:, 0].set(logp)
    more = lambda carry: (carry[0] < new_tokens) & ~jnp.all(carry[2])  # noqa: E731
    *_, made, logps = jax.lax.while_loop(more, body, (jnp.int32(1), cache, done, *made))
    ends = jnp.any(made[:, :, None] == stops, axis=2)
    lengths = jnp.where(ends.any(axis=1), jnp.minimum(jnp.argmax(ends, axis=1) + 1, new_tokens), new_tokens)
    return everywhere(Generated(made, logps, lengths), policy.mesh)


def _read(policy, tokens, segments, *, room, samples):
    """Logits after each prompt, the cache with `room` for its answer, and where it starts: a row for every sample."""
    B, P = tokens.shape
    starts = P - segments.sum(axis=1)
    positions = jnp.maximum(jnp.arange(P)[None] - starts[:, None], 0)
    cache = empty_cache(policy.config, B, P, policy.compute_dtype)
    scores, cache = _run(policy, tokens, positions, P - starts, segments, cache)

    def wide(x: Array) -> Array:
        row, slot = {5: (1, 3), 2: (0, 1), 0: (0, 0)}[x.ndim]
        ends = [(0, room if axis == slot else 0) for axis in range(x.ndim)]
        return jnp.pad(jnp.repeat(x, samples, axis=row), ends) if x.ndim else x

    return jnp.repeat(scores, samples, axis=0), jax.tree.map(wide, cache), jnp.repeat(starts, samples)


def _run(policy, tokens, positions, lengths, segments, cache):
    """Logits after the last of these tokens, and the cache with them; prompts are `lengths` tokens long."""
    edits = policy.edits
    if edits is not None:
        facts = {"answered": positions >= lengths[:, None], "asking": positions == lengths[:, None] - 1}
        chosen = reached(policy.reach, positions=positions, **facts)
        edits = edits._replace(mask=edits.mask * chosen * segments)
    out = forward(
        policy.config,
        policy.params,
        tokens,
        positions=positions,
        segments=segments,
        adapter=policy.adapter,
        edits=edits,
        cache=cache,
        compute_dtype=policy.compute_dtype,
        rows=sharded(policy.mesh),
    )
    return policy.head(out.hidden[:, -1]), out.cache


def _rows(edits: Edits | None, samples: int) -> Edits | None:
    """The edits of each prompt for each of its samples; one row for all stays one."""
    if edits is None or edits.add.shape[1] == 1:
        return edits
    add, gain, target = (jnp.repeat(x, samples, axis=1) for x in (edits.add, edits.gain, edits.target))
    mask = edits.mask if len(edits.mask) == 1 else jnp.repeat(edits.mask, samples, axis=0)
    return edits._replace(add=add, gain=gain, target=target, mask=mask)


def _apart(policy: Policy, cache: Cache) -> tuple[Policy, Cache]:
    """Weights and cache as one array per layer."""
    L = policy.config.layers
    params: dict[str, Any] = {**policy.params, "layers": apart(policy.params["layers"], L)}
    return policy.replace(params=params), cache._replace(k=apart(cache.k, L), v=apart(cache.v, L))


def degeneration(text: str, ids: Sequence[int]) -> dict[str, float]:
    """Signs of a text that loops: share of token 4-grams seen before in it, and zlib size / size."""
    import zlib

    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    raw = text.encode()
    return {"repetition": repeated, "compression": len(zlib.compress(raw)) / len(raw) if raw else 1.0}
