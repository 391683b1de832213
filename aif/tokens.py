"""From a conversation to token ids and the mask of trained tokens: the only tokenising path of the engine.

The rendered template is cut at the borders of each answer and every piece is tokenised by itself, with no special
tokens added (a template already holds its BOS), so that training, scoring and generation see the same ids. A border is
found by comparing renderings: the text up to the answer, with and without it. Where a template breaks that prefix
property, the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aif.corpus import Conversation
from aif.corpus.jsonl import told
from aif.errors import BadInput
from aif.models.chat_template import chat_text

# A special token's text inside a message is shielded while the template is rendered, then encoded as plain text.
SHIELD = ("\ue000", "\ue001")


class Encoded(NamedTuple):
    """One prompt with its responses as a tree of tokens: branch 0 is the prompt, branch k its k-th response.

    `index[n]` is the token whose hidden state predicts `targets[n]`, for response `response[n]` of the tree.
    """

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    index: np.ndarray
    targets: np.ndarray
    response: np.ndarray


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered text. Special tokens become their ids, except where they came from a message's own words."""
    ids: list[int] = []
    words = _shielded_words(tokenizer)
    for number, piece in enumerate(text.replace(SHIELD[1], SHIELD[0]).split(SHIELD[0])):
        if number % 2 == 0:
            ids += tokenizer.encode(piece, add_special_tokens=False) if piece else []
        else:
            ids += _plain(tokenizer, words[int(piece)])
    return ids


def render(tokenizer: Any, messages: Sequence[Any], *, answer_next: bool, where: str = "messages") -> str:
    """The chat template's text for these messages; `answer_next` appends the header of the assistant's turn.

    Raises:
      BadInput: the tokenizer has no template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise BadInput(
            f"{where}: the tokenizer has no chat template; name one (model.chat_template), or use `text` rows"
        )
    turns = [{"role": m.role, "content": _shield(tokenizer, m.content)} for m in messages]
    return chat_text(tokenizer, turns, answer_next=answer_next, where=where)


def encode_prompt(tokenizer: Any, messages: Sequence[Any], where: str = "messages") -> list[int]:
    """Ids of a prompt up to and including the header of the assistant's turn."""
    return encode_text(tokenizer, render(tokenizer, messages, answer_next=True, where=where))


def encode(tokenizer: Any, row: Conversation, candidates: Sequence[int], max_length: int) -> Encoded:
    """The token tree of a row with the chosen candidates.

    Raises:
      BadInput: an answer's borders cannot be found, no token is trained, or the tree is longer than `max_length`.
    """
    if row.kind == "text":
        ids = encode_text(tokenizer, _shield(tokenizer, row.candidates[0].content))
        return _fit(_path([(opening(tokenizer), False), (ids, True)]), row, max_length)
    if row.train_turns:
        return _fit(_path(_turns(tokenizer, row, candidates[0])), row, max_length)
    prompt_text = render(tokenizer, row.prompt, answer_next=True, where=row.where)
    prompt = encode_text(tokenizer, prompt_text)
    answers = [_answer(tokenizer, row.prompt, row.candidates[k].content, prompt_text, row.where) for k in candidates]
    return _fit(tree(prompt, answers), row, max_length)


def opening(tokenizer: Any) -> list[int]:
    """The token that every text of this tokenizer begins with, as the model was trained: none, or its BOS."""
    return [t for t in tokenizer.encode("", add_special_tokens=True)[:1] if t == tokenizer.bos_token_id]


def pieces(tokenizer: Any, encoded: Encoded) -> list[tuple[str, bool]]:
    """Every token in words, with whether it is trained; bytes that are no character by themselves stay as they are."""
    following = np.isin(np.arange(len(encoded.tokens)), encoded.index + 1)
    trained = encoded.branches > 0 if encoded.branches.any() else following  # a branch is an answer, trained whole
    words = tokenizer.convert_ids_to_tokens(encoded.tokens.tolist())
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in encoded.tokens.tolist()]
    return [(w if "\ufffd" in t else t, bool(on)) for w, t, on in zip(words, texts, trained, strict=True)]


def _shielded_words(tokenizer: Any) -> list[str]:
    """Texts that stand for themselves in a message: all control tokens, also those that no role (bos, eos, ...) names,
    and the shield's own marks. Longest first."""
    control = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*control, *tokenizer.all_special_tokens, *SHIELD}, key=lambda word: (-len(word), word))


def _shield(tokenizer: Any, content: str) -> str:
    words = _shielded_words(tokenizer)
    return re.sub("|".join(map(re.escape, words)), lambda m: f"{SHIELD[0]}{words.index(m[0])}{SHIELD[1]}", content)


def _plain(tokenizer: Any, text: str) -> list[int]:
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before


def encode_answer(tokenizer: Any, before: Sequence[Any], content: str, where: str) -> list[int]:
    """Ids of an answer to these messages, from the end of the assistant's header through its end-of-turn token."""
    return _answer(tokenizer, before, content, render(tokenizer, before, answer_next=True, where=where), where)


def _answer(tokenizer: Any, before: Sequence[Any], content: str, prompt_text: str, where: str) -> list[int]:
    from aif.corpus import Message

    whole = render(tokenizer, [*before, Message("assistant", content)], answer_next=False, where=where)
    if not whole.startswith(prompt_text):
        raise BadInput(
            f"{where}: the chat template rewrites the prompt once it is answered, so the trained tokens cannot be "
            "told apart; use a template that keeps the prompt as a prefix"
        )
    return _through_end(tokenizer, encode_text(tokenizer, whole[len(prompt_text) :]))


def _through_end(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def _turns(tokenizer: Any, row: Conversation, candidate: int) -> list[tuple[list[int], bool]]:
    """Pieces of a whole conversation, each with whether it is trained: every assistant turn is."""
    from aif.corpus import Message

    messages = [*row.prompt, Message("assistant", row.candidates[candidate].content)]
    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt_text = render(tokenizer, messages[:number], answer_next=True, where=row.where)
        answer = _answer(tokenizer, messages[:number], message.content, prompt_text, row.where)
        if not prompt_text.startswith(done):
            raise BadInput(
                f"{row.where}: the chat template rewrites earlier turns; use one that only appends{told(row.id)}"
            )
        pieces += [(encode_text(tokenizer, prompt_text[len(done) :]), False), (answer, True)]
        whole = render(tokenizer, messages[: number + 1], answer_next=False, where=row.where)
        tail = encode_text(tokenizer, whole[len(prompt_text) :])[len(answer) :]
        pieces.append((tail, False))
        done = whole
    return pieces[:-1]  # what follows the last answer predicts nothing


def _path(pieces: list[tuple[list[int], bool]]) -> Encoded:
    """A single branch; a trained first token has no predecessor and is not scored."""
    tokens = np.array([t for ids, _ in pieces for t in ids], np.int32)
    trained = np.array([on for ids, on in pieces for _ in ids], bool)
    targets = np.flatnonzero(trained & (np.arange(len(tokens)) > 0)).astype(np.int32)
    zeros = np.zeros(len(tokens), np.int32)
    steps = np.arange(len(tokens), dtype=np.int32)
    return Encoded(tokens, steps, zeros, targets - 1, tokens[targets], np.zeros(len(targets), np.int32))


def tree(prompt: list[int], answers: list[list[int]]) -> Encoded:
    """The prompt once, then each answer; an answer's first token is predicted by the prompt's last one."""
    start = len(prompt)
    tokens, positions, branches = [np.array(prompt)], [np.arange(start)], [np.zeros(start, int)]
    index, targets, response = [], [], []
    offset = start
    for number, answer in enumerate(answers):
        n = len(answer)
        tokens.append(np.array(answer))
        positions.append(start + np.arange(n))
        branches.append(np.full(n, number + 1))
        index.append(np.concatenate([[start - 1], offset + np.arange(n - 1)]))
        targets.append(np.array(answer))
        response.append(np.full(n, number))
        offset += n
    return Encoded(
        *(np.concatenate(x).astype(np.int32) for x in (tokens, positions, branches, index, targets, response))
    )


def _fit(encoded: Encoded, row: Conversation, max_length: int) -> Encoded:
    if len(encoded.targets) == 0:
        raise BadInput(
            f"{row.where}: no token of this row is trained; give it an assistant answer that is not empty{told(row.id)}"
        )
    if len(encoded.tokens) > max_length:
        raise BadInput(
            f"{row.where}: {len(encoded.tokens)} tokens do not fit into batch.length={max_length}; "
            f"raise batch.length or shorten the row{told(row.id)}"
        )
    return encoded
