"""State readers: from a response to beliefs over its orientation, one factor per scale dimension.

    Q(s_d | x, y),  d = 1..S,  each a distribution over the levels of the scale

and the likelihood A_d = P(observed level | state) with its Dirichlet counts. A reader is a file of this folder with
`Options` and `make(options, context)`; configs name it by `reader: {name: ...}`.

A reader has up to three parts. `annotate` runs on the host with the words of the responses (a judge); `watch` taps the
reference model's residual stream during the one forward pass that the habit needs anyway (probes); `read` turns what
they found into beliefs, inside the compiled `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float

from aif.types import Batch, Tap


class Reading(NamedTuple):
    """Beliefs `states [B, R, S, O]`, known `[B, R, S]` (0 where the reader has nothing to say), likelihood
    `A [S, O, O]` (outcome by state), its counts `pA` of the same shape, and, where the reader is an ensemble, the
    members' own beliefs `members [E, B, R, S, O]`, whose mean is `states`."""

    states: Float[Array, "B R S O"]
    known: Float[Array, "B R S"]
    A: Float[Array, "S O O"]
    pA: Float[Array, "S O O"]
    members: Float[Array, "E B R S O"] | None = None


class Answer(NamedTuple):
    """A response in words, with the prompt it answers; `ids` are its tokens where it was sampled as such."""

    prompt: Sequence[Any]  # messages
    content: str
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Reader:
    """How responses are read.

    Attributes:
      read: `(taps, batch) -> Reading`; a `jax.tree_util.Partial` whose arrays may change without compiling again.
      watch: `(batch) -> tap` over the reference's residual stream; its values come back stacked over layers as `taps`.
      annotate: `(answers) -> {name: [responses, ...]}`, facts that `read` finds in `batch.extras`.
      name: for logs and tables.
    """

    read: Callable[[Any, Batch], Reading]
    watch: Callable[[Batch], Tap] | None = None
    annotate: Callable[[Sequence[Answer]], dict[str, np.ndarray]] | None = None
    name: str = "reader"


__all__ = ["Answer", "Reader", "Reading"]
