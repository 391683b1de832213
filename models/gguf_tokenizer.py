"""The tokenizer of a GGUF file, rebuilt from its tokens, merges and scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aif.types import BadInput

from .decoder import DecoderConfig
from .weights import refusal

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types


def fast_tokenizer() -> Any:
    """The transformers class that wraps a `tokenizers.Tokenizer`; imported late, and quiet about torch being absent."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def gguf_tokenizer(fields: dict[str, Any], config: DecoderConfig, path: str | Path) -> Any:
    """The tokenizer that a GGUF file's metadata describes: byte-level BPE (`gpt2`), or SentencePiece BPE (`llama`).

    For byte-level BPE the file names its pre-tokenizer (`tokenizer.ggml.pre`) without describing it: an unknown name is
    refused, because a wrong pre-tokenizer yields plausible and wrong tokens.
    """
    own = {key[len("tokenizer.ggml.") :]: value for key, value in fields.items() if "tokenizer.ggml." in key}
    kind, pre = (str(own.get(key))[:80] for key in ("model", "pre"))
    if kind != "llama" and (kind != "gpt2" or pre not in _PRETOKENIZERS):
        raise BadInput(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported (llama, and gpt2 with "
            f"{', '.join(_PRETOKENIZERS)} are); load the Hugging Face folder of the model instead"
        )
    try:
        tokens, kinds = own["tokens"], own["token_type"]
        template = fields.get("tokenizer.chat_template")
        if not 0 < len(set(tokens)) == len(tokens) == len(kinds) <= config.vocab:
            raise ValueError(f"{len(tokens)} tokens are repeated, untyped or more than the {config.vocab} embeddings")
        if not (template is None or isinstance(template, str)):
            raise ValueError("the chat template is not a text")
        if "eos_token_id" not in own:
            raise ValueError("it names no end token")
        named = {name: tokens[own[key]] for name, key in _NAMED.items() if key in own}
        tokenizer = (_sentencepiece if kind == "llama" else _byte_level)(own, tokens, kinds)
        if own.get("add_bos_token"):
            _begin(tokenizer, named["bos_token"])
    except Exception as error:  # the package raises bare Exception for an inconsistent vocabulary
        what = f"{type(error).__name__}: {error}"[:160]
        raise refusal(str(path), [f"its tokenizer is inconsistent ({what})"], "convert the model again") from None
    return fast_tokenizer()(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_position,
        **named,
    )


def _byte_level(own: dict[str, Any], tokens: list[str], kinds: list[int]) -> Any:
    from tokenizers import Tokenizer, decoders, models

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in own.get("merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs))
    _add_tokens(tokenizer, tokens, kinds, normalized=False)
    tokenizer.normalizer, tokenizer.pre_tokenizer = _PRETOKENIZERS[own["pre"]]()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _sentencepiece(own: dict[str, Any], tokens: list[str], kinds: list[int]) -> Any:
    """SentencePiece's BPE: of all neighbours whose union is a piece, the union with the best score is made first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, scores = {token: number for number, token in enumerate(tokens)}, own["scores"]
    best = sorted((n for n, kind in enumerate(kinds) if kind == _NORMAL), key=lambda n: -scores[n])
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[n] for n in best)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = tokens[own["unknown_token_id"]]
    bpe = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    _add_tokens(tokenizer, tokens, kinds, normalized=True)  # SentencePiece looks for its own symbols in "\u2581" form
    prefix = [normalizers.Prepend("\u2581")] if own.get("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])  # pyright: ignore[reportAttributeAccessIssue]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[int], normalized: bool) -> None:
    """Tokens that are found in a text before it is cut: control tokens, and symbols that its makers defined."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=normalized and not special) for token in chosen])


def _begin(tokenizer: Any, bos: str) -> None:
    """Let texts that are encoded with their special tokens begin with `bos`."""
    from tokenizers.processors import TemplateProcessing

    number = tokenizer.token_to_id(bos)
    tokenizer.post_processor = TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, number)]
    )


def _smollm() -> tuple[Any, Any]:
    from tokenizers import pre_tokenizers as pre

    digits = pre.Digits(individual_digits=True)
    return None, pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False, use_regex=True)])


def _qwen2() -> tuple[Any, Any]:
    from tokenizers import Regex, normalizers
    from tokenizers import pre_tokenizers as pre

    words = pre.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    return normalizers.NFC(), pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRETOKENIZERS = {"smollm": _smollm, "qwen2": _qwen2}  # name -> (normalizer, pre-tokenizer)
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
