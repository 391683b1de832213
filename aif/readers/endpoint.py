"""Questions to a model behind an OpenAI-compatible address, with patience and a bound on what it may cost.

Slow, busy and broken replies are asked for again, with waits that double; a question that stays without a readable
reply is unknown, a row of zeros, and counted in the log. What only the user can mend stops at once.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aif.errors import BadInput
from aif.readers.chat import Again, complete
from aif.readers.kept import Kept
from aif.readers.rubric import level_of, weights_of

LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
HOPELESS = 32  # questions in a row without a reading after which the judge is given up
Entry = dict[str, Any]  # a judgement as it is kept: probabilities, whether they are the server's own, the reply
log = logging.getLogger(__name__)


@dataclass
class Endpoint:
    """`(prompts) -> probabilities [prompts, O]` over the level words; zeros where unknown.

    Attributes:
      base, served, key_variable, timeout: as in `complete`.
      soften: `[O, O]`, the belief given the level that a reply names, for servers without log-probabilities.
      retries: tries after the first. budget: calls in all. concurrency: calls at a time.
      sleep: waits between tries; by default one that ends when the judge is stopped.
      calls: how many were made so far. logprobs: whether they are asked for, until the server refuses them.
    """

    base: str
    served: str
    levels: tuple[str, ...]
    soften: np.ndarray
    kept: Kept
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 4
    budget: int = 10_000
    concurrency: int = 4
    sleep: Callable[[float], Any] | None = None
    calls: int = 0
    logprobs: bool = True
    lock: Any = field(default_factory=threading.Lock, repr=False)
    stopped: Any = field(default_factory=threading.Event, repr=False)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """One distribution per prompt; equal prompts are asked once, kept ones not at all.

        Raises:
          BadInput: wrong address, model or key; nobody answers; the budget does not reach.
        """
        found = {prompt: self.kept.get(self._key(prompt)) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, entry in found.items() if entry is None]
        left = self.budget - self.calls
        if len(missing) > left:
            raise BadInput(
                f"judge.budget: {len(missing)} questions are still to be asked and {left} of {self.budget} calls are "
                "left; raise judge.budget, or judge fewer answers"
            )
        if missing:
            found |= self._ask(missing)
        return np.array([self._belief(found[prompt]) for prompt in prompts], np.float32).reshape(-1, len(self.levels))

    def _key(self, prompt: str) -> tuple[str, ...]:
        return (self.base, self.served, prompt)

    def _belief(self, entry: Entry | None) -> np.ndarray:
        if entry is None:
            return np.zeros(len(self.levels))
        seen = np.array(entry["probabilities"], float)
        return seen if entry.get("weighted") else seen @ self.soften

    def _ask(self, prompts: list[str]) -> dict[str, Entry | None]:
        """Entries of all prompts, several calls at a time; the first error that a user must mend ends it."""
        found: dict[str, Entry | None] = {}
        causes: Counter[str] = Counter()
        row = 0
        self.stopped.clear()
        with ThreadPoolExecutor(self.concurrency, "judge") as pool:
            futures = {pool.submit(self._judge, prompt): prompt for prompt in prompts}
            try:
                for future in as_completed(futures):
                    try:
                        entry, cause = future.result()
                    except CancelledError:  # another question met the error that is to be shown
                        continue
                    found[futures[future]] = entry
                    causes.update([cause] if entry is None else [])
                    row = row + 1 if entry is None else 0
                    if row >= HOPELESS:
                        raise BadInput(
                            f"{self.base}: {row} questions in a row got no reading ({_listed(causes)}); check that "
                            f"{self.served!r} answers in one word, or judge with another model"
                        )
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if causes:
            log.warning("judge: %d of %d judgements are unknown (%s)", causes.total(), len(prompts), _listed(causes))
        return found

    def _judge(self, prompt: str) -> tuple[Entry | None, str]:
        """`_tries`; an error stops the other questions before their next call."""
        try:
            return self._tries(prompt)
        except BaseException:
            self.stopped.set()
            raise

    def _tries(self, prompt: str) -> tuple[Entry | None, str]:
        """(entry, "") of one prompt, or (None, why there is none) after the last try."""
        failures, logprobs = 0, self.logprobs
        while True:
            try:
                entry = self._try(prompt, logprobs)
            except Again as again:
                if logprobs and again.cause in ("HTTP 400", "HTTP 422"):  # how servers refuse a field they do not know
                    logprobs = False
                    continue
                failures += 1
                if again.fix and failures > self.retries:
                    raise BadInput(f"{self.base}: {again.cause}, {failures} times; {again.fix}") from None
                if failures > self.retries or not again.repeat:
                    return None, again.cause
                wait = 0.5 * 2 ** (failures - 1) * random.uniform(0.5, 1.5)
                sleep = self.stopped.wait if self.sleep is None else self.sleep
                sleep(min(max(wait, again.wait), LONGEST_WAIT))
            else:
                self.logprobs = self.logprobs and logprobs
                self.kept.put(self._key(prompt), {"endpoint": self.base, "served": self.served, **entry})
                return entry, ""

    def _try(self, prompt: str, logprobs: bool) -> Entry:
        """One call, paid for from the budget, and the judgement in its reply."""
        with self.lock:
            if self.stopped.is_set():
                raise CancelledError
            if self.calls >= self.budget:
                raise BadInput(
                    f"judge.budget: all {self.budget} calls are spent before every question is answered; raise "
                    "judge.budget and run again (what was judged is kept)"
                )
            self.calls += 1
        how = {"key_variable": self.key_variable, "timeout": self.timeout, "logprobs": logprobs}
        return judgement(complete(self.base, self.served, prompt, **how), self.levels)


def judgement(reply: Any, levels: tuple[str, ...]) -> Entry:
    """Probabilities of the levels from a chat completion: those of the level word's token, else one at the word.

    Raises:
      Again: fields are missing, or the reply names no level.
    """
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        listed = (choice.get("logprobs") or {}).get("content")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise Again("malformed reply") from None
    level = level_of(text, levels) if isinstance(text, str) else None
    if level is None:
        raise Again("no level word")
    weights = weights_of(listed, levels, level)
    alone = [float(k == level) for k in range(len(levels))]
    return {"reply": text, "weighted": weights is not None, "probabilities": weights or alone}


def _listed(causes: Counter[str]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in causes.most_common())


__all__ = ["Endpoint", "judgement"]
