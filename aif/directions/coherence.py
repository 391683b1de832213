"""Directional coherence of a corpus: do the differences that it teaches point one way?

    v_i = mean residual over the target answer's tokens - the same over its contrast, per layer;  u_i = v_i / ||v_i||
    R = || 1/N sum_i u_i ||,   null: R of s_i u_i with random signs s_i

R is 1 where all differences are parallel and about 1 / sqrt(N) where they are unrelated; random signs keep each
difference and its axis and take only the common sense away. The contrast is another stance, the mean of all other
answers, or the model's own answer to the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from aif.batches import build
from aif.corpus import Candidate, Conversation
from aif.corpus.tiers import target_of
from aif.directions.activations import response_means
from aif.errors import BadInput
from aif.policy import Policy
from aif.sampling import generate
from aif.tokens import encode_prompt

OTHERS, BASE = "others", "base"  # contrasts that are no stance
LENGTH = 2048  # tokens of a forward pass
TURNS = 8  # prompts answered at a time


class Coherence(NamedTuple):
    """Per layer: R, R under each of F flips of signs, the mean cosine of pairs of one domain and of two; and the cosine
    of every example with the mean of the others' unit vectors. NaN where there is no such pair."""

    resultant: Float[Array, "L"]
    null: Float[Array, "F L"]
    within: Float[Array, "L"]
    across: Float[Array, "L"]
    own: Float[Array, "N L"]


def coherence(v: Float[Array, "N L D"], domains: Int[Array, "N"], signs: Float[Array, "F N"]) -> Coherence:
    """The statistics of differences v, with the domain's number and F rows of signs (+1 or -1) per example."""
    return _coherence(v, jax.nn.one_hot(domains, len(domains)), signs)


@jax.jit
def _coherence(v: Array, domains: Array, signs: Array) -> Coherence:
    N = len(v)
    length = jnp.linalg.norm(v, axis=-1, keepdims=True)
    u = v / jnp.where(length > 0, length, 1.0)
    total = u.sum(axis=0)
    by_domain = jnp.einsum("nk,nld->kld", domains, u)
    square = lambda x: jnp.sum(jnp.square(x), axis=-1)  # noqa: E731
    inside = square(by_domain).sum(axis=0)
    pairs = jnp.sum(jnp.square(domains.sum(axis=0)))
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), jnp.nan)  # noqa: E731
    others = total - u
    return Coherence(
        resultant=jnp.linalg.norm(total, axis=-1) / N,
        null=jnp.linalg.norm(jnp.einsum("fn,nld->fld", signs, u), axis=-1) / N,
        within=ratio(inside - square(u).sum(axis=0), pairs - N),
        across=ratio(square(total) - inside, N * N - pairs),
        own=ratio(jnp.sum(u * others, axis=-1), jnp.linalg.norm(others, axis=-1)),
    )


def measure(v: np.ndarray, rows: Sequence[Conversation], *, flips: int = 500, seed: int = 0) -> Coherence:
    """`coherence` of the differences `[N, L, D]` of these rows, with `flips` random flips of signs."""
    _, numbers = np.unique([row.domain for row in rows], return_inverse=True)
    signs = jax.random.rademacher(jax.random.key(seed), (flips, len(rows)), jnp.float32)
    return coherence(jnp.asarray(v), jnp.asarray(numbers), signs)


def differences(policy: Policy, tokenizer: Any, rows: Sequence[Conversation], *, target: str) -> np.ndarray:
    """v_i `[N, L, D]`: target answer minus the mean of the row's other answers, in one pass over all of them."""
    plain = [replace(row, train_turns=False) for row in rows]
    length = min(LENGTH, policy.config.max_position)
    data = build(plain, tokenizer, which="all", length=length, target=target)
    means = response_means(policy, data, rows=1).means
    number = np.array([row for row, _ in data.owners])
    chosen = np.array([rows[r].candidates[k] is target_of(rows[r], target) for r, k in data.owners])
    weight = np.zeros((len(rows), len(number)), np.float32)  # which answers each difference is made of
    weight[number, np.arange(len(number))] = np.where(chosen, 1.0, -1.0)
    weight[weight < 0] /= np.repeat((weight < 0).sum(axis=1), (weight < 0).sum(axis=1))
    return np.einsum("nm,mld->nld", weight, means)


def contrasted(rows: Sequence[Conversation], target: str, contrast: str) -> list[Conversation]:
    """The rows that have a target answer, with it and its contrast only: the answers of a stance, or all others.

    Raises:
      BadInput: no row has both.
    """
    found = []
    for row in (r for r in rows if r.candidates):
        chosen = target_of(row, target)
        others = [c for c in row.candidates if c is not chosen and contrast in (OTHERS, c.stance)]
        if row.prompt and chosen.stance in (target, "chosen") and others:
            found.append(replace(row, candidates=(chosen, *others)))
    if not found:
        stances = sorted({c.stance for row in rows for c in row.candidates if c.stance})
        raise BadInput(
            f"contrast: no row has an answer of stance {target!r} and a contrast {contrast!r}; the stances are "
            f"{', '.join(stances) or 'none'}, and {OTHERS} and {BASE} stand for all others and the model's own answer"
        )
    return found


def answered(
    policy: Policy, tokenizer: Any, rows: Sequence[Conversation], *, target: str, tokens: int
) -> list[Conversation]:
    """The rows with the target answer (the only one, where it has no stance) and the model's own, greedy and at most
    `tokens` long; rows that the model answers with nothing are left out."""
    asked = [row for row in rows if row.prompt and row.candidates]
    found = []
    for start in range(0, len(asked), TURNS):
        some = asked[start : start + TURNS]
        prompts = [encode_prompt(tokenizer, row.prompt, row.where) for row in some]
        made = generate(policy, prompts, new_tokens=tokens, stop=tokenizer.eos_token_id)
        for row, ids, n in zip(some, np.asarray(made.tokens), np.asarray(made.lengths), strict=True):
            said = tokenizer.decode(ids[:n], skip_special_tokens=True)
            if said.strip():
                found.append(replace(row, candidates=(target_of(row, target), Candidate(said, BASE))))
    return found


def summary(found: Coherence, rows: Sequence[Conversation]) -> dict[str, Any]:
    """Everything by layer and the outliers, ready for JSON.

    `layer` is where R exceeds the 95th percentile of its null most. Outliers are rows whose cosine there lies below
    the first quartile by more than 1.5 times the distance of the quartiles (Tukey's rule); the lowest first.
    """
    R, null, own = (np.asarray(x, np.float64) for x in (found.resultant, found.null, found.own))
    bound = np.percentile(null, 95, axis=0)
    layer = int(np.argmax(R - bound))
    p = (1 + (null >= R).sum(axis=0)) / (1 + len(null))
    low, high = np.percentile(own[:, layer], [25, 75])
    order = [k for k in np.argsort(own[:, layer]) if own[k, layer] < low - 1.5 * (high - low)]
    columns = {"R": R, "null_mean": null.mean(axis=0), "null_95": bound, "p": p}
    columns |= {"cosine_within_domains": found.within, "cosine_across_domains": found.across}
    return {
        "rows": len(rows),
        "layer": layer,
        "layers": [{"layer": l} | {k: _number(v[l]) for k, v in columns.items()} for l in range(len(R))],
        "cosine_to_the_others": {
            q: _number(np.percentile(own[:, layer], int(q))) for q in ("0", "25", "50", "75", "100")
        },
        "outliers": [
            {"id": rows[k].id, "domain": rows[k].domain, "where": rows[k].where, "cosine": _number(own[k, layer])}
            for k in order
        ],
    }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


__all__ = ["BASE", "OTHERS", "Coherence", "answered", "coherence", "contrasted", "differences", "measure", "summary"]
