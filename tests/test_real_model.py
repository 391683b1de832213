"""SmolLM2-135M from the catalogue: the same tokens, chat text and logits as transformers (`golden/make_logits.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from aif.models import hub

pytestmark = pytest.mark.real
GOLDEN = Path(__file__).parent / "golden" / "smollm2.npz"

TEXTS = [
    "12345 and 3.14159, 2024-11-05",
    "1. one\n2. two\n10. ten\n",
    "日本語 и русский, עברית mixed",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈",
    "    four spaces\n\ttab  end ",
    "\x00\x01\x1b[0m\x7f\x85",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def model() -> hub.LM:
    return hub.load("smollm2-135m")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def test_sizes(model):
    facts = hub.inspect("smollm2-135m")
    assert facts["parameters"] == hub.CATALOGUE["smollm2-135m"].parameters
    assert (model.config.layers, model.config.width, model.config.rope_theta) == (30, 576, 1e5)
    assert model.config.tied and model.tokenizer.vocab_size == model.config.vocab == 49152


def test_odd_texts_round_trip(model):
    for text in TEXTS:
        assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text
    assert model.tokenizer("<|im_start|>")["input_ids"] == [1]
    assert len(model.tokenizer("12345")["input_ids"]) == 5
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(model.tokenizer, n) for n in names] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    ]


def test_token_ids_agree_with_transformers(model, golden):
    for case in json.loads(str(golden["tokenizer_cases"])):
        assert model.tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]


def test_chat_template_agrees_with_transformers(model, golden):
    messages = json.loads(str(golden["chat_messages"]))
    text = model.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == str(golden["chat_text"])
    assert model.tokenizer(text, add_special_tokens=False)["input_ids"] == golden["chat_ids"].tolist()


def test_continuation_is_sensible(model):
    ids = model.tokenizer("The capital of France is")["input_ids"]
    assert model.tokenizer.decode([int(model.logits([ids])[0, -1].argmax())]) == " Paris"


def test_logits_agree_with_transformers(model, golden):
    logits = np.asarray(model.logits(golden["tokens"]))
    np.testing.assert_allclose(logits[..., :512], golden["logits_first"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), golden["logsumexp"], rtol=0, atol=5e-4)
    assert np.array_equal(logits.argmax(-1), golden["argmax"])
