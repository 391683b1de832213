"""Answers rated by any state reader: by its words, or through the residual stream of a model that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif.batches import build, once, one_per_row
from aif.config import check
from aif.corpus import Conversation, Scale
from aif.experiment import Experiment
from aif.models.hub import LM
from aif.plugins import plugin
from aif.policy import Policy, bind
from aif.readers import Answer, Reader
from aif.tokens import tree
from aif.types import as_partial

LENGTH = 4096  # tokens of a conversation that a reader's model reads at most
FITTED = 1536  # tokens of a prompt with all of its answers, of the corpus that a reader is fitted on


def reader_of(
    name: str, options: dict[str, Any], *, model: str, corpus: str, scale: str, limit: int | None = None
) -> tuple[Reader, Experiment]:
    """A reader by name, and the experiment whose model it looks into or asks.

    Args:
      options: its own. corpus: what a reader that must be fitted is fitted on; `limit` bounds its training prompts.

    Raises:
      BadInput: no such reader, an option is not right, or the corpus does not suit it.
    """
    tree = {"model": {"source": model, "remat": "none"}, "batch": {"rows": 1, "length": FITTED}}
    tree |= {"corpus": {"path": corpus, "scale": scale, "limit": limit}}
    experiment = Experiment(check({**tree, "arms": {"none": {"objective": {"name": "sft"}, "steps": 1}}}))
    if name == "judge" and "endpoint" not in options:
        options = {"model": model, **options}
    return made_reader(experiment, name, options), experiment


def made_reader(experiment: Experiment, name: str, options: dict[str, Any]) -> Reader:
    """A reader by name, looking into the experiment's base model where it does."""
    module, checked = plugin("readers", name, options, f"reader {name}")
    context = replace(experiment.context, rated=lambda: experiment.rated(experiment.base))
    return module.make(checked, context)


def beliefs(reader: Reader, rows: Sequence[Conversation], lm: LM | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What a reader believes of every row's first answer: probabilities `[N, S, O]`, and which are known `[N, S]`.

    Args:
      lm: the model into whose residual stream the reader looks, where it does.
    """
    if reader.watch is not None:
        assert lm is not None, "this reader looks into a model"
        return _watched(reader, rows, bind(lm), lm.tokenizer)
    batch = one_per_row([tree([0], [[0]])] * len(rows), 2, 1, 1)
    extras = {}
    if reader.annotate is not None:
        noted = reader.annotate([Answer(row.prompt, row.candidates[0].content) for row in rows])
        extras = {name: jnp.asarray(table)[:, None] for name, table in noted.items()}
    reading = reader.read(None, batch._replace(extras=extras))
    return np.asarray(reading.states[:, 0]), np.asarray(reading.known[:, 0]) > 0


def _watched(
    reader: Reader, rows: Sequence[Conversation], policy: Policy, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    assert reader.watch is not None
    length = min(LENGTH, policy.config.max_position)
    data = build(rows, tokenizer, which="target", length=length, target="")
    states, known = [], []
    for batch in once(data, rows=1):
        reading = _read(policy, batch, as_partial(reader.watch), as_partial(reader.read))
        filled = batch.ids >= 0
        states += zip(batch.ids[filled].tolist(), np.asarray(reading.states)[filled], strict=True)
        known += zip(batch.ids[filled].tolist(), np.asarray(reading.known)[filled], strict=True)
    order = lambda found: np.stack([x for _, x in sorted(found, key=lambda pair: pair[0])])  # noqa: E731
    return order(states), order(known) > 0


@jax.jit
def _read(policy: Policy, batch: Any, watch: Any, read: Any) -> Any:
    return read(policy(batch, tap=watch(batch)).taps, batch)


def rated(rows: Sequence[Conversation], scale: Scale, states: np.ndarray, known: np.ndarray) -> list[Conversation]:
    """The rows with the likeliest level of every dimension as the answer's rating, and the expected level beside it."""
    names = [d.id for d in scale.dimensions]
    likely, expected = states.argmax(axis=-1), states @ np.arange(states.shape[-1])
    out = []
    for row, levels, means, on in zip(rows, likely, expected, known, strict=True):
        ratings = {d: int(v) for d, v, k in zip(names, levels, on, strict=True) if k}
        beside = {"expected": {d: round(float(m), 4) for d, m, k in zip(names, means, on, strict=True) if k}}
        answer = row.candidates[0]
        out.append(replace(row, candidates=(replace(answer, ratings=ratings, extra={**answer.extra, **beside}),)))
    return out


__all__ = ["beliefs", "made_reader", "rated", "reader_of"]
