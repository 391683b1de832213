"""Systems that can be talked to: a model on this machine, or one behind an OpenAI-compatible address."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from aif.corpus import Message
from aif.errors import BadInput
from aif.models.hub import LM
from aif.policy import Policy, bind
from aif.readers.chat import Again, complete
from aif.sampling import generate
from aif.tokens import encode_prompt
from aif.types import Adapter

System = Callable[[Sequence[Sequence[Message]]], list[str]]  # conversations -> what the system says next
TOGETHER = 8  # conversations answered at a time


def local(
    lm: LM, adapter: Adapter | None = None, *, tokens: int = 160, temperature: float = 0.0, seed: int = 0
) -> System:
    """A model on this machine, with an adapter if wished; greedy at temperature 0."""
    return speaking(bind(lm, adapter), lm.tokenizer, tokens=tokens, temperature=temperature, seed=seed)


def speaking(policy: Policy, tokenizer: Any, *, tokens: int, temperature: float = 0.0, seed: int = 0) -> System:
    """A policy that answers through the chat template."""
    count = iter(range(1 << 30))

    def some(talks: Sequence[Sequence[Message]]) -> list[str]:
        asked = [encode_prompt(tokenizer, talk, "protocol") for talk in talks]
        key = jax.random.fold_in(jax.random.key(seed), next(count))
        stop = tokenizer.eos_token_id
        made = generate(policy, asked, new_tokens=tokens, stop=stop, temperature=temperature, key=key)
        ids = [np.asarray(t)[:n] for t, n in zip(made.tokens, made.lengths, strict=True)]
        return [tokenizer.decode(i, skip_special_tokens=True) for i in ids]

    return lambda talks: [said for k in range(0, len(talks), TOGETHER) for said in some(talks[k : k + TOGETHER])]


def remote(
    base: str,
    served: str,
    *,
    tokens: int = 160,
    temperature: float = 0.0,
    key_variable: str = "OPENAI_API_KEY",
    timeout: float = 120.0,
    retries: int = 4,
    concurrency: int = 4,
    sleep: Callable[[float], Any] = time.sleep,
) -> System:
    """A model behind an OpenAI-compatible address; broken and busy replies are asked for again, with waits that double.

    Raises (when called):
      BadInput: wrong address, model or key, or no usable reply after the last try.
    """
    how: dict[str, Any] = {"key_variable": key_variable, "timeout": timeout, "section": "protocol"}
    how |= {"max_tokens": tokens, "temperature": temperature}

    def one(talk: Sequence[Message]) -> str:
        for attempt in range(retries + 1):
            try:
                return _content(complete(base, served, talk, **how))
            except Again as again:
                if attempt == retries or not again.repeat:
                    fix = again.fix or "run again, or ask for fewer tokens"
                    raise BadInput(f"{base}: {again.cause}, {attempt + 1} times; {fix}") from None
                sleep(max(0.5 * 2**attempt, again.wait))
        raise AssertionError

    def answer(talks: Sequence[Sequence[Message]]) -> list[str]:
        with ThreadPoolExecutor(concurrency, "protocol") as pool:
            return list(pool.map(one, talks))

    return answer


def _content(reply: Any) -> str:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (TypeError, KeyError, IndexError):
        raise Again("malformed reply") from None
    if not isinstance(content, str):
        raise Again("a reply without words")
    return content


__all__ = ["System", "local", "remote", "speaking"]
