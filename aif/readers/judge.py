"""A language model as the reader: it rates every dimension of an answer under the scale's rubric.

    Q(s_d = k | x, y)  proportional to  p_judge(word_k | rubric of d, x, y)

The belief is the judge's distribution over the level words, not a sample of it. The judge is a local model, or one
behind an OpenAI-compatible address; where it gives no reading, the dimension counts as unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field, field_validator, model_validator

from aif.batches import GRAIN, build
from aif.corpus import Candidate, Conversation, Message, Scale
from aif.errors import BadInput
from aif.models.catalogue import cache_folder
from aif.models.hub import LM, load
from aif.objectives import Context
from aif.objectives.logprobs import scores
from aif.policy import bind
from aif.readers import Answer, Reader, Reading
from aif.readers.endpoint import Endpoint
from aif.readers.kept import Kept
from aif.readers.ratings import reliability
from aif.readers.rubric import question
from aif.tokens import encode
from aif.types import Batch

DEFAULT = "smollm2-135m"
TOKENS = 4096  # of a forward pass of the local judge
Ask = Callable[[Sequence[str]], np.ndarray]  # prompts -> probabilities [prompts, O]; rows of zeros are unknown
log = logging.getLogger(__name__)


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    model: str = Field(
        default="", description=f"local judge: what `aif.load` takes; {DEFAULT} where no endpoint is given"
    )
    endpoint: str = Field(default="", description="OpenAI-compatible address instead, such as http://localhost:8000/v1")
    served: str = Field(default="", description="name of the model there")
    key_variable: str = Field(default="OPENAI_API_KEY", description="environment variable that holds the key")
    timeout: float = Field(default=60.0, gt=0, description="seconds a call may take")
    retries: int = Field(default=4, ge=0, description="tries after the first, with waits that double")
    budget: int = Field(default=10_000, ge=0, description="calls to the endpoint in all, tries included")
    concurrency: int = Field(default=4, ge=1, le=64, description="calls at a time")
    cache: str = Field(
        default="", description="folder of judgements; by default kept for an endpoint, not for a local model"
    )
    agreement: float = Field(default=0.8, gt=0, le=1, description="chance that the judge names the true level")
    strength: float = Field(default=16.0, gt=0, description="Dirichlet counts per state behind the reliability matrix")

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)  # a ValueError of its own for broken hosts
        plain = value.isascii() and value.isprintable() and not set(value) & set(" ?#@") and parts.port != 0
        if value and not (plain and parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError("give http://host:port/v1, with no key, user or query in it")
        return value.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def _name_of_a_variable(cls, value: str) -> str:
        if not (value.isidentifier() and value.isascii()):
            raise ValueError("name an environment variable here, and put the key into it")
        return value

    @model_validator(mode="after")
    def _one_judge(self) -> Options:
        if self.model and self.endpoint:
            raise ValueError("model and endpoint: both are given; name a local model or an endpoint")
        if bool(self.endpoint) != bool(self.served):
            raise ValueError("endpoint and served: one is given without the other; give the address and the model")
        return self


def judge(scale: Scale, ask: Ask, *, agreement: float = 0.8, strength: float = 16.0) -> Reader:
    """A reader that asks about every dimension of every answer.

    Args:
      ask: the judge. agreement, strength: reliability matrix A and its counts, as in `ratings`.
    """
    O = len(scale.levels)
    A = jnp.broadcast_to(reliability(O, agreement), (len(scale.dimensions), O, O))
    return Reader(Partial(_read, A=A, pA=strength * A), annotate=partial(annotate, scale=scale, ask=ask), name="judge")


def make(options: Options, context: Context) -> Reader:
    """From a config; a local model is loaded when the first answer is judged.

    Raises:
      BadInput: the experiment has no scale.
    """
    scale = context.scale
    if scale is None:
        raise BadInput("judge: rates by the rubric of a scale and there is none; set corpus.scale")
    levels = tuple(scale.levels)
    if options.endpoint:
        A = np.asarray(reliability(len(levels), options.agreement))
        kept = Kept(Path(options.cache or cache_folder() / "judged").expanduser(), len(levels))
        named = options.model_dump(include={"served", "key_variable", "timeout", "retries", "budget", "concurrency"})
        soften = A / A.sum(axis=1, keepdims=True)  # Q(s | word), uniform prior over states
        ask: Ask = Endpoint(options.endpoint, levels=levels, soften=soften, kept=kept, **named)
    else:
        kept = Kept(Path(options.cache).expanduser() if options.cache else None, len(levels))
        ask = Local(options.model or DEFAULT, levels, kept)
    return judge(scale, ask, agreement=options.agreement, strength=options.strength)


def annotate(answers: Sequence[Answer], *, scale: Scale, ask: Ask) -> dict[str, np.ndarray]:
    """`judged [responses, S, O]` float32: the judge's distribution per dimension, zeros where it gave none."""
    prompts = [question(scale, dimension, answer) for answer in answers for dimension in scale.dimensions]
    found = np.asarray(ask(prompts), np.float32)
    return {"judged": found.reshape(len(answers), len(scale.dimensions), len(scale.levels))}


def _read(taps: Any, batch: Batch, *, A: Array, pA: Array) -> Reading:
    judged = batch.extras["judged"]  # [B, R, S, O]
    mass = judged.sum(axis=-1, keepdims=True)
    known = (mass > 0) & (batch.ids >= 0)[..., None, None]
    states = jnp.where(known, judged / jnp.where(known, mass, 1.0), 1 / judged.shape[-1])
    return Reading(states, known[..., 0].astype(jnp.float32), A, pA)


@dataclass(frozen=True)
class Local:
    """`(prompts) -> probabilities [prompts, O]` from a model on this machine."""

    source: str
    levels: tuple[str, ...]
    kept: Kept

    @cached_property
    def lm(self) -> LM:
        return load(self.source)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """One distribution per prompt; zeros where a prompt is longer than the model reads."""
        found = {prompt: self.kept.get((self.lm.fingerprint, prompt)) for prompt in prompts}
        missing = [prompt for prompt, entry in found.items() if entry is None]
        rows = {prompt: np.array(entry["probabilities"]) for prompt, entry in found.items() if entry is not None}
        for prompt, row in zip(missing, word_probabilities(self.lm, missing, self.levels), strict=True):
            rows[prompt] = row
            if row.any():
                self.kept.put((self.lm.fingerprint, prompt), {"model": self.source, "probabilities": row.tolist()})
        return np.array([rows[prompt] for prompt in prompts]).reshape(-1, len(self.levels))


def word_probabilities(lm: LM, prompts: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """softmax_k ln p(word_k, end of turn | prompt) through the chat template, `[prompts, words]`; zeros for prompts
    that are longer than the model reads. A prompt runs once for all of its words."""
    out = np.zeros((len(prompts), len(words)))
    rows = [_conversation(prompt, words, number) for number, prompt in enumerate(prompts)]
    sizes = [len(encode(lm.tokenizer, row, range(len(words)), 1 << 30).tokens) for row in rows]
    fitting = [number for number, size in enumerate(sizes) if size <= lm.config.max_position]
    if len(fitting) < len(prompts):
        short = len(prompts) - len(fitting)
        log.warning("judge: %d of %d judgements are unknown (longer than %s reads)", short, len(prompts), lm.source)
    if fitting:
        longest = -(-max(sizes[number] for number in fitting) // GRAIN) * GRAIN
        data = build([rows[n] for n in fitting], lm.tokenizer, which="all", length=longest, target="")
        logps = scores(bind(lm), data, rows=max(1, TOKENS // longest))
        out[fitting] = jax.nn.softmax(logps.reshape(len(fitting), len(words)), axis=-1)
    return out


def _conversation(prompt: str, words: Sequence[str], number: int) -> Conversation:
    """A prompt with the level words as its candidate answers."""
    return Conversation(
        id=str(number),
        prompt=(Message("user", prompt),),
        candidates=tuple(Candidate(word) for word in words),
        domain="",
        language="",
        split="",
        kind="preference",
        where=f"judge: question {number + 1}",
    )


__all__ = ["Ask", "Local", "Options", "annotate", "judge", "make", "word_probabilities"]
