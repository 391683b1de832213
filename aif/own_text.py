"""A model's own text: unconditional samples, as a source of text like that of its pre-training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from aif.policy import Policy
from aif.sampling import generate

TRIES = 8  # samples drawn per passage that is asked for, at most


@dataclass(frozen=True)
class OwnText:
    """Samples at temperature 1 from nothing but the token that opens a text; each is a document (see
    `aif.corpus.pretraining.Source`).

    Attributes:
      count: passages that will be asked for, which bounds the samples drawn.
      together: samples of a batch.
    """

    policy: Policy
    tokenizer: Any
    count: int
    tokens: int = 256
    together: int = 8
    seed: int = 0
    name: str = "samples"

    def pool(self, n: int) -> int | None:
        return n

    def documents(self) -> Iterator[str]:
        """Samples in batches until enough were drawn."""
        opening = self.tokenizer.bos_token_id
        opening = self.tokenizer.eos_token_id if opening is None else opening
        stop, key = self.tokenizer.eos_token_id, jax.random.key(self.seed)
        for batch in range(-(-TRIES * self.count // self.together)):
            made = generate(
                self.policy,
                [[opening]] * self.together,
                new_tokens=self.tokens,
                stop=stop,
                temperature=1.0,
                key=jax.random.fold_in(key, batch),
            )
            for ids, n in zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True):
                yield self.tokenizer.decode(ids[:n], skip_special_tokens=True)


__all__ = ["OwnText"]
