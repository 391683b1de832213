"""Responses sampled from a policy, as a batch that objectives can read.

K samples of a prompt share it in one row, branch by branch, exactly as the K candidates of a corpus do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jax import Array

from aif.batches import one_per_row
from aif.corpus import Conversation
from aif.objectives import Rollouts
from aif.policy import Policy
from aif.readers import Answer
from aif.sampling import BUCKET, generate
from aif.tokens import encode_prompt, tree
from aif.types import Batch


@dataclass(frozen=True)
class Prompts:
    """Prompts to sample from: their ids and, for readers of words, their messages and the way back to text."""

    ids: tuple[tuple[int, ...], ...]
    stop: int
    messages: tuple[Sequence[Any], ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the prompts, which a resumed run must meet again."""
        return hashlib.sha256(repr((self.ids, self.stop)).encode()).hexdigest()[:16]

    @property
    def length(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))

    def order(self, rows: int, seed: int) -> grain.DatasetIterator:
        """Endless shuffled batches of `rows` prompt numbers."""
        numbers = grain.MapDataset.range(len(self.ids)).seed(seed).shuffle().repeat()
        return iter(numbers.to_iter_dataset().batch(rows))


def prompts_of(rows: Sequence[Conversation], tokenizer: Any) -> Prompts:
    """The prompts of a corpus's rows, through the chat template.

    Raises:
      BadInput: the template refuses a row.
    """
    ids = tuple(tuple(encode_prompt(tokenizer, row.prompt, row.where)) for row in rows)
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    return Prompts(ids, tokenizer.eos_token_id, tuple(row.prompt for row in rows), decode)


def roll(
    policy: Policy, prompts: Prompts, chosen: Sequence[int], how: Rollouts, key: Array
) -> tuple[Batch, list[Answer]]:
    """`how.samples` responses to each chosen prompt: a batch with `sampled_logps [B, N]` among its extras (nats at
    temperature 1, under the policy that sampled), and the responses in words where the prompts can be decoded."""
    K, n = how.samples, how.new_tokens
    asked = [prompts.ids[c] for c in chosen]
    made = generate(policy, asked, new_tokens=n, stop=prompts.stop, samples=K, temperature=how.temperature, key=key)
    tokens, logps, lengths = (np.asarray(x) for x in made)
    answers = [tokens[k, : lengths[k]].tolist() for k in range(len(asked) * K)]
    trees = [tree(list(prompts.ids[c]), answers[row * K : row * K + K]) for row, c in enumerate(chosen)]
    batch = one_per_row(trees, -(-prompts.length // BUCKET) * BUCKET + K * n, K * n, K)
    sampled = np.zeros(batch.weights.shape, np.float32)
    for row in range(len(chosen)):
        parts = [logps[k, : lengths[k]] for k in range(row * K, row * K + K)]
        sampled[row, : sum(map(len, parts))] = np.concatenate(parts)
    words = []
    if prompts.decode is not None:
        words = [Answer(prompts.messages[chosen[k // K]], prompts.decode(a), a) for k, a in enumerate(answers)]
    return batch._replace(extras={"sampled_logps": sampled}), words
