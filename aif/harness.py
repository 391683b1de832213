"""A model as lm-evaluation-harness sees it: plain, adapted or steered (needs the extra `eval`).

    ln p(continuation | context),   the same along a whole text in windows,   a continuation of a context

by the engine's own scoring and sampling. Continuations of one context are branches that share its reading, and what
steers the model acts on the context as on a prompt and on the continuation as on a response.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from aif.batches import Dataset, from_trees, once
from aif.errors import BadInput
from aif.models.chat_template import chat_text
from aif.models.hub import LM
from aif.objectives.logprobs import judged_tokens, response_sums
from aif.policy import Policy, bind
from aif.sampling import generate
from aif.sharding import shared
from aif.steering import Scope, reach
from aif.tokens import opening, tree
from aif.types import Adapter, Batch, Edits

DRAWING = ("temperature", "top_k", "top_p", "min_p")
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a context and of its continuation


class HarnessLM(TemplateLM):
    """A loaded model for `lm_eval.simple_evaluate(model=...)`.

    As in the harness's own `hf` model, a text begins as the tokenizer begins texts, what is too long loses its
    beginning, and an empty context is the BOS (or else the end) token; unlike there, a text that is scored whole does
    not get a second BOS.

    Args:
      rows: rows of a batch, in which contexts with their continuations are packed; prompts that are continued at once.
      seed: of what is drawn where a task asks for sampling.
    """

    def __init__(
        self,
        lm: LM,
        *,
        adapter: Adapter | None = None,
        edits: Edits | None = None,
        scope: Scope = "all",
        rows: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.rows, self.seed = lm.tokenizer, rows, seed
        self.max_length, self._source = lm.config.max_position, lm.source
        self.policy = bind(lm, adapter, edits, reach=reach(scope), compute_dtype=lm.compute_dtype)
        self._stops = cache(self._stopping)

    @property
    def tokenizer_name(self) -> str:
        """What tells this model's requests apart from another's."""
        return self._source

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, in which control tokens may be written out; it begins as the tokenizer begins texts."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        begin = [] if add_special_tokens is False else opening(self.tokenizer)
        return ids if ids[: len(begin)] == begin else begin + ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template writes it."""
        return chat_text(self.tokenizer, chat_history, answer_next=add_generation_prompt, where="task")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """ln p(continuation | context) in nats, and whether greedy decoding would write the continuation."""
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        data, order = _shared(pairs)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            for batch in once(data, rows=self.rows, even=shared(self.policy.mesh)):
                logps, greedy = (np.asarray(x) for x in _judged(self.policy, batch))
                for place in zip(*np.nonzero(batch.ids >= 0), strict=True):
                    found[order[batch.ids[place]]] = (float(logps[place]), bool(greedy[place]))
                bar.update(int((batch.ids >= 0).sum()))
        return found

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """A request without the beginning of a context that is too long; the last token is never read, only scored."""
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            raise BadInput(
                f"a continuation of {len(continuation)} tokens cannot be scored; the model reads 1 to {self.max_length}"
            )
        return tuple((context or [self.prefix_token_id])[-room:]), tuple(continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p(text) in nats; a text longer than the model reads is scored in windows, every token once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        total = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm) if windows else []
        for number, (logp, _) in zip(owners, scored, strict=True):
            total[number] += logp
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts up to a stop text, which is left out; requests that ask alike share batches."""
        texts = [""] * len(requests)
        ids = [self.tok_encode(request.args[0]) for request in requests]
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for asked, numbers in alike.items():
                numbers.sort(key=lambda number: -len(ids[number]))
                for start in range(0, len(numbers), self.rows):
                    some = numbers[start : start + self.rows]
                    for number, text in zip(some, self._continued([ids[n] for n in some], asked, some), strict=True):
                        texts[number] = text
                    bar.update(len(some))
        return texts

    def _continued(self, prompts: list[list[int]], asked: str, numbers: list[int]) -> Iterator[str]:
        """Continuations of a few prompts as generation arguments (JSON) ask; request n draws with the n-th key."""
        how: dict[str, Any] = dict(normalize_gen_kwargs(json.loads(asked), default_max_gen_toks=256))
        until, length, drawn = how.pop("until"), how.pop("max_gen_toks"), how.pop("do_sample")
        if unknown := set(how) - set(DRAWING):
            raise BadInput(
                f"generation_kwargs: {min(unknown)} is not known; {', '.join(DRAWING)}, until and max_gen_toks are"
            )
        if length >= self.max_length:
            raise BadInput(f"generation_kwargs: max_gen_toks {length} leaves no room of {self.max_length} for a prompt")
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(self.seed), n))(np.array(numbers))
        made = generate(
            self.policy,
            [(prompt or [self.prefix_token_id])[-(self.max_length - length) :] for prompt in prompts],
            new_tokens=length,
            stop=self._stops(tuple(until)),
            key=keys,
            **(how if drawn else {}),
        )
        for tokens, n in zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True):
            text = self.tokenizer.decode(tokens[:n], skip_special_tokens=True)
            yield min((text.partition(stop)[0] for stop in until if stop), key=len, default=text)

    def _stopping(self, until: tuple[str, ...]) -> list[int]:
        """The end token, and every token whose own text holds a stop text: none needs to be continued."""
        ids = range(len(self.tokenizer))
        words = self.tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False) if until else []
        return [
            self.eot_token_id,
            *(i for i, word in zip(ids, words, strict=False) if any(s in word for s in until if s)),
        ]


@jax.jit
def _judged(policy: Policy, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """ln p of every response slot, and whether all of its tokens are the likeliest."""
    logps, likeliest = judged_tokens(policy, batch)
    return response_sums(logps, batch), response_sums(1.0 - likeliest, batch) == 0


def _shared(pairs: Sequence[Pair]) -> tuple[Dataset, list[int]]:
    """Requests as trees of continuations that share a context, in rows of at most twice the longest request; and which
    request each response of the data set answers."""
    most = 2 * max(len(context) + len(continuation) for context, continuation in pairs)
    groups: list[list[int]] = []
    latest: dict[tuple[int, ...], tuple[list[int], int]] = {}  # context -> its open group and the tokens in it
    for number, (context, continuation) in enumerate(pairs):
        group, size = latest.get(context, ([], most))
        if size + len(continuation) > most:
            group, size = [], len(context)
            groups.append(group)
        group.append(number)
        latest[context] = group, size + len(continuation)
    trees = [tree(list(pairs[group[0]][0]), [list(pairs[n][1]) for n in group]) for group in groups]
    owners = [(number, k) for number, group in enumerate(groups) for k in range(len(group))]
    return from_trees(trees, {}, owners, length=most), [n for group in groups for n in group]
