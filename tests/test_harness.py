"""What lm-evaluation-harness is told of a model; benchmarks/harness.py has its own Hugging Face model beside it."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from aif.errors import BadInput
from aif.harness import HarnessLM
from aif.steering import add

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("The sky", " is blue"), ("The sky", " is"), ("", "alone"), ("two ", "words"), ("The sky", "!"), ("é", "ü")]


def asked(*arguments: tuple) -> list:
    """Requests, as the harness hands them over."""
    return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="session")
def lm(lm):
    """The random model, whose likeliest token is always a letter or sign of ASCII, so that its texts are whole."""
    embed = lm.params["embed"].at[:32].set(0.0).at[127:].set(0.0)
    return replace(lm, params=lm.params | {"embed": embed})


@pytest.fixture(scope="module")
def model(lm) -> HarnessLM:
    return HarnessLM(lm, rows=2)


def by_hand(lm, ids: list[int], scored: int, **values) -> tuple[float, bool]:
    """Sum of ln softmax(logits) over the last tokens, and whether each is the likeliest."""
    logits = np.asarray(lm.logits(jnp.array([ids[:-1]]), **values))[0, -scored:].astype(np.float64)
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    targets = np.array(ids[-scored:])
    return logps[np.arange(scored), targets].sum(), bool((logits.argmax(axis=-1) == targets).all())


def test_likelihood_is_the_sum_over_the_continuation(lm, model):
    """Reference: logits of the whole text; an empty context is the BOS token."""
    found = model.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    for (context, continuation), (logp, greedy) in zip(PAIRS, found, strict=True):
        end = list(continuation.encode())
        ids = (list(context.encode()) or [lm.tokenizer.bos_token_id]) + end
        scored = len(end) + (context.endswith(" "))  # a blank before a word belongs to the word
        want, likeliest = by_hand(lm, ids, scored)
        assert abs(logp - want) < 1e-3 and greedy == likeliest, (context, continuation)


def test_the_likeliest_continuation_is_known_as_greedy(lm, model):
    (text,) = model.generate_until(asked(("Once", {"until": [], "max_gen_toks": 3})), disable_tqdm=True)
    words = model.tok_encode("Once") + model.tok_encode(text)
    pairs = [(None, words[:4], words[4:]), (None, words[:4], [*words[4:-1], (words[-1] + 1) % 256])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


def test_together_equals_alone(model):
    """Metamorphic: continuations that share the reading of a context, packed beside others, in any order."""
    together = [logp for logp, _ in model.loglikelihood(asked(*PAIRS, *PAIRS[::-1]), disable_tqdm=True)]
    alone = [model.loglikelihood(asked(pair), disable_tqdm=True)[0][0] for pair in PAIRS]
    np.testing.assert_allclose(together, alone + alone[::-1], rtol=0, atol=2e-4)


def test_a_text_is_scored_once_per_token_in_windows(lm):
    """Reference: each window by hand; the last one sees as much before it as fits. A short text is one window."""
    room, text = 8, "twenty one characters"
    short = HarnessLM(replace(lm, config=replace(lm.config, max_position=room)))
    whole, few = short.loglikelihood_rolling(asked((text,), ("few",)), disable_tqdm=True)
    ids = [lm.tokenizer.bos_token_id, *text.encode()]
    want = sum(by_hand(lm, ids[start : start + room + 1], room)[0] for start in (0, room))
    want += by_hand(lm, ids[-(room + 1) :], (len(ids) - 1) % room)[0]
    assert abs(whole - want) < 1e-3
    assert abs(few - by_hand(lm, [lm.tokenizer.bos_token_id, *b"few"], 3)[0]) < 1e-3


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    short = HarnessLM(replace(lm, config=replace(lm.config, max_position=8)))
    cut = short._loglikelihood_tokens([(None, list(b"0123456789"), list(b"abc"))], disable_tqdm=True)[0][0]
    assert abs(cut - by_hand(lm, list(b"456789abc"), 3)[0]) < 1e-3
    with pytest.raises(BadInput, match="9 tokens cannot be scored"):
        short._loglikelihood_tokens([(None, [1], list(b"123456789"))], disable_tqdm=True)


def test_generation_ends_before_a_stop_text(model):
    """Metamorphic: a stop text only cuts, whether one token holds it or several; requests of all kinds keep order."""
    free = {"until": [], "max_gen_toks": 12}
    first, second = model.generate_until(asked(("Once", free), ("Twice upon", free)), disable_tqdm=True)
    one, two = first[2], second[3:5]
    cuts = [("Twice upon", {"until": two, "max_gen_toks": 12}), ("Once", {"until": [one], "max_gen_toks": 12})]
    assert model.generate_until(asked(*cuts, ("Once", {**free, "max_gen_toks": 1})), disable_tqdm=True) == [
        second.partition(two)[0],
        first.partition(one)[0],
        first[:1],
    ]


def test_sampling_follows_the_seed(lm, model):
    how = {"do_sample": True, "temperature": 2.0, "top_k": 50, "until": ["\n"], "max_gen_toks": 12}
    draws = [m.generate_until(asked(("Once", how)), True) for m in (model, model, HarnessLM(lm, rows=2, seed=1))]
    assert draws[0] == draws[1] != draws[2]


def test_what_cannot_be_asked_is_refused(model):
    with pytest.raises(BadInput, match="num_beams is not known"):
        model.generate_until(asked(("Once", {"num_beams": 4})), True)
    with pytest.raises(BadInput, match="max_gen_toks 5000 leaves no room"):
        model.generate_until(asked(("Once", {"max_gen_toks": 5000})), True)


def test_adapter_and_edits_reach_every_kind_of_request(lm, model, adapter):
    """Metamorphic: dose 0 is the plain model; a dose acts on the tokens of its scope, and an adapter changes all."""
    L, D = lm.config.layers, lm.config.width
    vector = jax.random.normal(jax.random.key(0), (L, D))
    edits = lambda dose: add(vector, jnp.array([dose]), jnp.ones(L), layers=[0])  # noqa: E731

    def answers(m: HarnessLM) -> list:
        made = m.generate_until(asked(("Once", {"until": [], "max_gen_toks": 8})), True)
        scored = m.loglikelihood(asked(("The sky", " is blue")), disable_tqdm=True)[0][0]
        return [scored, m.loglikelihood_rolling(asked(("some text",)), True)[0], *made]

    plain = answers(model)
    same = answers(HarnessLM(lm, edits=edits(0.0)))
    np.testing.assert_allclose(same[:2], plain[:2], rtol=0, atol=1e-4)
    assert same[2] == plain[2]
    for other in (answers(HarnessLM(lm, edits=edits(5.0))), answers(HarnessLM(lm, adapter=adapter))):
        assert all(abs(a - b) > 1e-2 for a, b in zip(other[:2], plain[:2], strict=True)) and other[2] != plain[2]
    late = HarnessLM(lm, edits=edits(5.0), scope="response")
    one = [m.loglikelihood(asked(("The sky", "!")), disable_tqdm=True)[0][0] for m in (late, model)]
    assert abs(one[0] - one[1]) < 1e-4  # the one token of the continuation is predicted before it is steered


def test_chat_is_the_models_own_template(model):
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tok_encode(text)[0] == 257 and model.tokenizer_name == "tiny-random"


def test_aif_eval(call, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tasks = ("aif_facts", "aif_texts", "aif_starts", "--model", "tiny-random", "--tasks", "benchmarks/eval")
    status, out, err = call("eval", *tasks, "--limit", 2, "--out", tmp_path / "found.json")
    assert status == 0 and "aif_facts" in out and "byte_perplexity" in out, err
    found = json.loads((tmp_path / "found.json").read_text())
    assert 1 < found["results"]["aif_texts"]["byte_perplexity,none"] < 1e4
    assert found["asked"]["model"] == "tiny-random" and found["n-samples"]["aif_facts"]["effective"] == 2
    refused("eval", *tasks, "--out", tmp_path / "found.json", line="found.json: exists already")
    refused("eval", "aif_fact", "--tasks", "benchmarks/eval", line="aif_fact: no such task; did you mean aif_facts?")
    refused("eval", "x", "--tasks", "nowhere", line="--tasks nowhere: is no folder")


def test_without_the_harness_its_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    refused("eval", "aif_facts", line="pip install 'aif[eval]'")
