"""Where a step's micro-batches come from: the packed corpus, or samples of the policy that is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aif.batches import Dataset, stream
from aif.corpus import Conversation
from aif.objectives import Objective
from aif.policy import Policy
from aif.readers import Answer
from aif.rollouts import Prompts, roll
from aif.sharding import host
from aif.types import Batch, as_partial


def stacked(batches: list[Batch]) -> Batch:
    """Micro-batches of one shape as `[A, B, ...]`."""
    return jax.tree.map(lambda *x: np.stack([host(y) for y in x]), *batches)


def tokens_of(batch: Batch) -> int:
    """Tokens that are not padding, in the batch and beside it."""
    return int((batch.segments > 0).sum()) + (0 if batch.beside is None else tokens_of(batch.beside))


class Offline:
    """Shuffled batches of an encoded corpus, each with a batch of the data `beside` it where there are such."""

    updates = 1

    def __init__(
        self,
        data: Dataset,
        objective: Objective,
        reference: Policy,
        *,
        rows: int,
        accumulate: int,
        seed: int,
        position: list | None,
    ):
        self.objective, self.reference = objective, reference.replace(remat="none")
        self.accumulate, self.key = accumulate, jax.random.key(seed)
        parts = [(data, rows)]
        if data.beside is not None and objective.beside is not None:
            parts.append((data.beside, objective.beside.rows or rows))
        starts = position or [None] * len(parts)
        self.streams = [stream(d, rows=n, seed=seed, start=at) for (d, n), at in zip(parts, starts, strict=True)]

    def __call__(self, policy: Policy, number: int) -> Batch:
        """The micro-batches of 0-based step `number`."""
        key = jax.random.fold_in(self.key, number)
        return stacked([self.micro(jax.random.fold_in(key, a)) for a in range(self.accumulate)])

    def micro(self, key: jax.Array) -> Batch:
        """One micro-batch, with the facts that are not kept per response."""
        batch, *others = (next(s) for s in self.streams)
        batch = batch._replace(beside=others[0]) if others else batch
        return batch if self.objective.cached else with_facts(batch, [], self.objective, self.reference, key)

    def position(self) -> Any:
        """Where the streams stand, to be restored."""
        return [s.get_state() for s in self.streams]


class Online:
    """Rollouts of the policy at hand, prepared under the reference, each used for `updates` steps."""

    def __init__(
        self,
        prompts: Prompts,
        objective: Objective,
        reference: Policy,
        *,
        rows: int,
        accumulate: int,
        seed: int,
        position: dict | None,
    ):
        assert objective.rollouts is not None
        self.prompts, self.objective, self.how = prompts, objective, objective.rollouts
        self.reference = reference.replace(remat="none")
        self.updates, self.accumulate, self.key = self.how.updates, accumulate, jax.random.key(seed)
        self.order = prompts.order(rows, seed)
        if position is not None:
            self.order.set_state(position)
        self.held: Batch | None = None

    def __call__(self, policy: Policy, number: int) -> Batch:
        """The micro-batches of 0-based step `number`; fresh ones at every `updates`-th."""
        if self.held is None or number % self.updates == 0:
            key = jax.random.fold_in(self.key, number)
            self.held = stacked([self.rollout(policy, jax.random.fold_in(key, a)) for a in range(self.accumulate)])
        return self.held

    def rollout(self, policy: Policy, key: jax.Array) -> Batch:
        """One prepared micro-batch."""
        batch, answers = roll(policy, self.prompts, next(self.order).tolist(), self.how, key)
        return with_facts(batch, answers, self.objective, self.reference, key)

    def position(self) -> Any:
        """Where the order of prompts stands, to be restored."""
        return self.order.get_state()


def annotated(data: Dataset, rows: Sequence[Conversation], objective: Objective) -> Dataset:
    """The data with what the objective says of its answers' words; `rows` are those it was built from."""
    if objective.annotate is None:
        return data
    answers = [Answer(rows[r].prompt, rows[r].candidates[k].content) for r, k in data.owners]
    return data.with_tables(objective.annotate(answers))


def with_facts(batch: Batch, answers: list, objective: Objective, reference: Policy, key: jax.Array) -> Batch:
    """The batch with what `annotate` says of its responses' words, and then with what `prepare` finds."""
    ids = np.maximum(np.asarray(batch.ids), 0)
    noted = objective.annotate(answers) if objective.annotate is not None and answers else {}
    batch = batch._replace(extras={**batch.extras, **{name: table[ids] for name, table in noted.items()}})
    facts = prepare(as_partial(objective.prepare), reference, batch, key)
    return batch._replace(extras={**batch.extras, **facts})


@jax.jit
def prepare(function: Any, reference: Policy, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """An objective's `prepare`, compiled."""
    return function(reference, batch, key)
