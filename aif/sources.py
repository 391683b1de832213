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
from aif.types import Batch, as_partial


def stacked(batches: list[Batch]) -> Batch:
    """Micro-batches of one shape as `[A, B, ...]`."""
    return jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *batches)


class Offline:
    """Shuffled batches of an encoded corpus."""

    updates = 1

    def __init__(self, data: Dataset, *, rows: int, accumulate: int, seed: int, position: dict | None):
        self.batches = stream(data, rows=rows, seed=seed, start=position)
        self.accumulate = accumulate

    def __call__(self, policy: Policy, number: int) -> Batch:
        """The micro-batches of 0-based step `number`."""
        return stacked([next(self.batches) for _ in range(self.accumulate)])

    def position(self) -> Any:
        """Where the stream stands, to be restored."""
        return self.batches.get_state()


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
    noted = {} if objective.annotate is None else objective.annotate(answers)
    batch = batch._replace(extras={**batch.extras, **{name: table[ids] for name, table in noted.items()}})
    facts = prepare(as_partial(objective.prepare), reference, batch, key)
    return batch._replace(extras={**batch.extras, **facts})


@jax.jit
def prepare(function: Any, reference: Policy, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """An objective's `prepare`, compiled."""
    return function(reference, batch, key)
