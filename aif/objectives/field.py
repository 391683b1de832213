"""A field: preferences given by a text. What the reference would rather say with the text in its context is preferred.

    U(y) = ln pi_ref(y | field, x)      or, `relative`,      ln pi_ref(y | field, x) - ln pi_ref(y | x)        (nats)

The whole answer is the outcome and the framed reference its preferred distribution, C(y) = ln P(y | C). At precision 1
and in the relative form the policy posterior E exp(U) is the framed reference: the field is distilled into weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.batches import GRAIN, from_trees
from aif.corpus import Message
from aif.errors import BadInput
from aif.objectives import Context
from aif.objectives.logprobs import scores
from aif.policy import Policy
from aif.readers import Answer
from aif.tokens import encode_answer, encode_prompt, tree
from aif.types import Batch

if TYPE_CHECKING:
    from aif.objectives.terms import Evaluation, Terms

TOKENS = 4096  # of a forward pass


class FieldPreference(BaseModel, extra="forbid"):
    """Preferences from a text in the reference's context."""

    frame: str = Field(description="id of a scaffolding row (of the corpus, or bundled), or a .txt file")
    relative: bool = Field(default=False, description="measure against the reference without the text")


def by_field(evaluation: Evaluation, wanted: FieldPreference, context: Context) -> Evaluation:
    """The evaluation with its pragmatic value replaced by the field's; information gains stay the reader's.

    Raises:
      BadInput: there is no such frame, or it does not fit into the model's context.
    """
    from aif.objectives.terms import Evaluation

    find = partial(utilities, context=context, frame=context.frame(wanted.frame), relative=wanted.relative)

    def annotate(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
        noted = {} if evaluation.annotate is None else evaluation.annotate(answers)
        return {**noted, "field": find(answers)}

    return Evaluation(Partial(_evaluate, inner=evaluation.evaluate), evaluation.watch, annotate)


def _evaluate(taps: Any, batch: Batch, *, inner: Partial) -> Terms:
    field: Array = batch.extras["field"]
    return {**inner(taps, batch), "pragmatic": field * (batch.ids >= 0)}


def utilities(answers: Sequence[Answer], *, context: Context, frame: str, relative: bool) -> np.ndarray:
    """U of every answer `[answers]`, nats."""
    assert context.reference is not None, "an objective with a field is made for a reference"
    reference = context.reference.replace(remat="none")
    framed = answer_logprobs(reference, context.tokenizer, answers, frame)
    return framed - answer_logprobs(reference, context.tokenizer, answers, "") if relative else framed


def answer_logprobs(policy: Policy, tokenizer: Any, answers: Sequence[Answer], frame: str) -> np.ndarray:
    """ln p(answer | frame, prompt) `[answers]`; neighbours that answer one prompt share one reading of it."""
    trees = []
    for prompt, group in groupby(answers, key=lambda answer: answer.prompt):
        asked = framed_prompt(prompt, frame)
        said = [list(a.ids) or encode_answer(tokenizer, asked, a.content, "field") for a in group]
        trees.append(tree(encode_prompt(tokenizer, asked, "field"), said))
    longest = -(-max(len(t.tokens) for t in trees) // GRAIN) * GRAIN
    deepest = max(int(t.positions.max()) for t in trees) + 1
    if deepest > policy.config.max_position:
        raise BadInput(
            f"preferences.frame: with its longest prompt and answer it takes {deepest} tokens and the model reads "
            f"{policy.config.max_position}; shorten the text"
        )
    data = from_trees(trees, {}, [(k, 0) for k in range(len(answers))], length=longest)
    return scores(policy, data, rows=max(1, TOKENS // longest)).astype(np.float32)


def framed_prompt(prompt: Sequence[Any], frame: str) -> tuple[Any, ...]:
    """The prompt with the frame as its system message, before a system message of its own."""
    if not frame:
        return tuple(prompt)
    own = prompt[0].content if prompt and prompt[0].role == "system" else ""
    rest = prompt[1:] if own else prompt
    return (Message("system", f"{frame}\n\n{own}" if own else frame), *rest)
