"""The residual at the end of each of many texts, with every shared beginning read once.

Contrast pairs made from templates share most of their tokens: the same persona before every suffix, the same suffix cut
at many lengths. A text that begins another is read at its last token inside the longer one; texts that begin alike
become branches of one tree. What is left is read in packed rows; nothing is padded and nothing is read twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aif.batches import Dataset, from_trees, once
from aif.directions.activations import Activations
from aif.errors import BadInput
from aif.policy import Policy
from aif.sharding import shared
from aif.tokens import Encoded, tree
from aif.types import Batch

Text = tuple[int, ...]


class Family(NamedTuple):
    """Texts that begin with the same `common` tokens; none of them begins another."""

    common: int
    texts: list[Text]


def families(texts: Sequence[Sequence[int]], length: int) -> list[Family]:
    """The texts that begin no other, grouped where a shared beginning saves tokens, at most `length` tokens a family.

    Raises:
      BadInput: a text is empty or longer than `length`.
    """
    for number, text in enumerate(texts):
        if not 0 < len(text) <= length:
            raise BadInput(f"text {number}: has {len(text)} tokens; give 1 to {length}")
    ordered = sorted({tuple(text) for text in texts})
    after = [*ordered[1:], ()]
    found: list[Family] = []
    for text in (t for t, longer in zip(ordered, after, strict=True) if longer[: len(t)] != t):
        if found:
            common, group = found[-1]
            shared = len(os.path.commonprefix([group[0][:common] if len(group) > 1 else group[0], text]))
            size = sum(map(len, group)) + len(text) - len(group) * shared
            if len(group) * shared > (len(group) - 1) * common and size <= length:
                found[-1] = Family(shared, [*group, text])
                continue
        found.append(Family(len(text) - 1, [text]))
    return found


def _encoded(family: Family) -> tuple[Encoded, dict[Text, int]]:
    """The family as a tree of tokens, and at which token each beginning of its texts ends."""
    common, texts = family
    ends = {texts[0][: n + 1]: n for n in range(common)}
    at = common
    for text in texts:
        ends |= {text[: n + 1]: at + n - common for n in range(common, len(text))}
        at += len(text) - common
    return tree(list(texts[0][:common]), [list(text[common:]) for text in texts]), ends


def shared_rows(texts: Sequence[Sequence[int]], length: int) -> tuple[Dataset, list[int]]:
    """A data set whose listed tokens (`Batch.index`) are the ends of the texts, and the response of each text."""
    wanted = {tuple(text) for text in texts}
    trees, place, count = [], {}, 0
    for family in families(texts, length):
        encoded, ends = _encoded(family)
        mine = [text for text in ends if text in wanted and text not in place]
        place |= {text: count + n for n, text in enumerate(mine)}
        index = np.array([ends[text] for text in mine], np.int32)
        zeros, slots = np.zeros(len(mine), np.int32), np.arange(len(mine), dtype=np.int32)
        trees.append(encoded._replace(index=index, targets=zeros, response=slots))
        count += len(mine)
    owners = [(n, 0) for n in range(count)]
    return from_trees(trees, {}, owners, length=length), [place[tuple(text)] for text in texts]


@jax.jit
def _listed(policy: Policy, batch: Batch) -> Array:
    pick = lambda h: jnp.take_along_axis(h, batch.index[..., None], axis=1).astype(jnp.float32)  # noqa: E731
    return policy(batch, tap=pick).taps


def end_residuals(policy: Policy, texts: Sequence[Sequence[int]], *, rows: int = 2, length: int = 512) -> Activations:
    """Residual after every block at the last token of each text (lists of token ids), in their order.

    `norms` are mean residual norms of these tokens.

    Raises:
      BadInput: a text is empty or longer than `length`.
    """
    data, place = shared_rows(texts, length)
    found = np.zeros((len(data.owners), policy.config.layers, policy.config.width), np.float32)
    for batch in once(data, rows=rows, even=shared(policy.mesh)):
        taps = np.asarray(_listed(policy.replace(remat="none"), batch)).transpose(1, 2, 0, 3)  # [B, N, L, D]
        row, n = np.nonzero(batch.weights > 0)
        found[batch.ids[row, batch.response[row, n]]] = taps[row, n]
    means = found[place]
    return Activations(means, np.ones(len(place), np.int64), np.linalg.norm(means, axis=-1).mean(axis=0))
