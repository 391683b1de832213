"""Generation with a key-value cache, adapters and edits.

Prompts are padded on the left to a common bucket, read once, and continued one token at a time inside one compiled
loop that ends when every row has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from aif.models.decoder import empty_cache, forward, logits
from aif.policy import Policy
from aif.steering import Scope

BUCKET = 32  # prompt lengths are rounded up to multiples of this, which bounds the number of compilations


class Generated(NamedTuple):
    """New tokens `[B, n]`, their log-probabilities under the sampling policy at temperature 1, and lengths `[B]`
    (the stop token included; what follows is padding)."""

    tokens: Int[Array, "B n"]
    logps: Float[Array, "B n"]
    lengths: Int[Array, "B"]


def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop: int,
    temperature: float = 0.0,
    key: Array | None = None,
    scope: Scope = "all",
) -> Generated:
    """Continue each prompt by up to `new_tokens` tokens; temperature 0 is greedy.

    The policy's edits act on prompt tokens, on generated tokens, or on all, as `scope` says; the first generated token
    is predicted from the last prompt token, which is a prompt token.
    """
    longest = max(len(p) for p in prompts)
    width = -(-longest // BUCKET) * BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    segments = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    on = np.array([scope in ("all", "prompt"), scope in ("all", "response")], np.float32)
    key = jax.random.key(0) if key is None else key
    policy = policy.replace(remat="none")
    return _generate(policy, tokens, segments, np.int32(stop), np.float32(temperature), key, on, new_tokens=new_tokens)


@partial(jax.jit, static_argnames="new_tokens")
def _generate(policy, tokens, segments, stop, temperature, key, on, *, new_tokens):
    B, P = tokens.shape
    cache = empty_cache(policy.config, B, P + new_tokens, policy.compute_dtype)
    starts = P - segments.sum(axis=1)

    def run(tokens, positions, segments, cache, mask):
        edits = None if policy.edits is None else policy.edits._replace(mask=mask)
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
        )
        return logits(policy.params, out.hidden[:, -1]), out.cache

    def choose(scores, step):
        warm = jnp.where(temperature > 0, temperature, 1.0)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), scores / warm)
        token = jnp.where(temperature > 0, drawn, jnp.argmax(scores, axis=-1)).astype(jnp.int32)
        logp = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(scores, axis=1)
        return token, logp

    def body(carry):
        step, scores, cache, done, out_tokens, out_logps = carry
        token, logp = choose(scores, step)
        token, logp = jnp.where(done, stop, token), jnp.where(done, 0.0, logp)
        out_tokens = out_tokens.at[:, step].set(token)
        out_logps = out_logps.at[:, step].set(logp)
        ended = done | (token == stop)
        position = (P + step - starts)[:, None]
        scores, cache = run(token[:, None], position, jnp.ones((B, 1), jnp.int32), cache, jnp.full((B, 1), on[1]))
        return step + 1, scores, cache, ended, out_tokens, out_logps

    positions = jnp.maximum(jnp.arange(P)[None] - starts[:, None], 0)
    scores, cache = run(tokens, positions, segments, cache, segments * on[0])
    blank = jnp.full((B, new_tokens), stop, jnp.int32)
    first = (jnp.int32(0), scores, cache, jnp.zeros(B, bool), blank, jnp.zeros((B, new_tokens)))
    more = lambda carry: (carry[0] < new_tokens) & ~jnp.all(carry[3])  # noqa: E731
    _, _, _, _, out_tokens, out_logps = jax.lax.while_loop(more, body, first)
    stops = out_tokens == stop
    lengths = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, new_tokens)
    return Generated(out_tokens, out_logps, lengths)


def degeneration(text: str, ids: Sequence[int]) -> dict[str, float]:
    """Signs of a text that loops: share of token 4-grams seen before in it, and zlib size / size."""
    import zlib

    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    raw = text.encode()
    return {"repetition": repeated, "compression": len(zlib.compress(raw)) / len(raw) if raw else 1.0}
