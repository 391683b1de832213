"""Steered answers with their signs of degeneration; side by side, held-out prompts at -dose, 0 and +dose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif import results as records
from aif.batches import one_per_row
from aif.objectives.logprobs import response_logprobs
from aif.policy import Policy
from aif.sampling import bucket, degeneration, generate
from aif.steering import add
from aif.tokens import encode_prompt, tree
from aif.types import Direction

if TYPE_CHECKING:
    from aif.experiment import Experiment


class Signs(NamedTuple):
    """Signs of degeneration: share of token 4-grams seen before, zlib size / size, and perplexity under the model that
    is not steered."""

    repetition: float
    compression: float
    perplexity: float


class Continued(NamedTuple):
    """A generated answer."""

    ids: list[int]
    text: str
    signs: Signs


def continued(
    plain: Policy,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    stop: int,
    decode: Callable[[Sequence[int]], str],
    new_tokens: int,
) -> list[Continued]:
    """The policy's greedy answers, all in one batch, judged by `plain`."""
    made = generate(policy, prompts, new_tokens=new_tokens, stop=stop)
    answers = [np.asarray(t)[:n].tolist() for t, n in zip(made.tokens, made.lengths, strict=True)]
    texts = [decode(ids) for ids in answers]
    surprise = perplexities(plain, prompts, answers, new_tokens)
    return [
        Continued(ids, text, Signs(**degeneration(text, ids), perplexity=float(p)))
        for ids, text, p in zip(answers, texts, surprise, strict=True)
    ]


def perplexities(
    policy: Policy, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], longest: int
) -> np.ndarray:
    """exp(mean nats per token) of each answer to its prompt under a policy; none has more than `longest` tokens."""
    trees = [tree(list(prompt), [list(answer)]) for prompt, answer in zip(prompts, answers, strict=True)]
    batch = one_per_row(trees, bucket(max(map(len, prompts)) + longest), longest, 1)
    logps = np.asarray(_scored(policy.replace(remat="none"), batch))[:, 0]
    return np.exp(-logps / np.array([len(answer) for answer in answers]))


_scored = jax.jit(response_logprobs)


def steered_samples(
    experiment: Experiment, direction: Direction, norms: np.ndarray, layer: int
) -> list[records.Sample]:
    """Greedy answers to the first held-out prompts; the three doses of all prompts are one batch."""
    config = experiment.config.samples
    rows = experiment.rows(experiment.config.corpus.heldout)[: config.prompts]
    if not rows:
        return []
    tokenizer = experiment.lm.tokenizer
    doses = [-config.dose, 0.0, config.dose]
    prompts = [encode_prompt(tokenizer, row.prompt, row.where) for row in rows for _ in doses]
    edits = add(direction.vector, jnp.tile(jnp.array(doses), len(rows)), jnp.asarray(norms), layers=[layer])
    policy, decode = experiment.base.replace(edits=edits), lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    made = continued(experiment.base, policy, prompts, tokenizer.eos_token_id, decode, config.tokens)
    return [
        records.Sample(
            prompt=rows[k // len(doses)].prompt[-1].content,
            arm="base",
            direction="contrast direction" if doses[k % len(doses)] else "",
            layer=layer,
            dose=doses[k % len(doses)],
            text=answer.text,
            tokens=len(answer.ids),
            **answer.signs._asdict(),
        )
        for k, answer in enumerate(made)
    ]
