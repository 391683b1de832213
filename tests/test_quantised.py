"""Frozen weights in few bits: what they are, what they cost in nats, and adapters that are trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif
from aif.adapter import lora
from aif.config import load as load_config
from aif.errors import BadInput
from aif.export import export_merged
from aif.models.hub import inspect, load
from aif.models.quantised import NF4, floats, in_few_bits, quantised
from aif.models.weights import read_folder
from aif.policy import bind
from aif.sampling import generate

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def weights():
    """A stack [3, 96, 5], of which 32 numbers share a scale; one block is all zeros."""
    return np.random.default_rng(0).normal(size=(3, 96, 5)).astype(np.float32) * (np.arange(96) >= 32)[:, None]


def test_int8_is_the_nearest_of_255_levels(weights):
    """Value: |w - s q| <= s / 2 with s = max |w| / 127 of a block."""
    found = quantised(weights, "int8")
    blocks = weights.reshape(3, 3, 32, 5)
    error = np.abs(np.asarray(found.astype(jnp.float32)).reshape(blocks.shape) - blocks)
    assert (error <= np.abs(blocks).max(axis=2, keepdims=True) / 254 * (1 + 1e-4) + 1e-9).all()
    assert found.codes.dtype == jnp.int8 and found.shape == weights.shape


def test_nf4_is_the_nearest_of_16_levels(weights):
    """Reference: every level tried; two codes lie in a byte."""
    found = quantised(weights, "nf4")
    blocks = weights.reshape(3, 3, 32, 5)
    scale = np.abs(blocks).max(axis=2, keepdims=True)
    tried = scale[..., None] * np.array(NF4, np.float32)
    nearest = np.take_along_axis(
        np.broadcast_to(tried, (*blocks.shape, 16)), np.abs(tried - blocks[..., None]).argmin(-1)[..., None], -1
    )
    got = np.asarray(found.astype(jnp.float32)).reshape(blocks.shape)
    np.testing.assert_allclose(np.abs(got - blocks), np.abs(nearest[..., 0] - blocks), rtol=0, atol=1e-6)
    assert found.codes.nbytes == weights.size / 2 and found.shape == weights.shape


def test_nf4_is_that_of_bitsandbytes():
    """Golden numbers of `golden/make_nf4.py`, bit for bit; weights are stored `[out, in]` there."""
    golden = np.load(Path(__file__).parent / "golden" / "nf4.npz")
    found = quantised(jnp.asarray(golden["weights"].T), "nf4")
    np.testing.assert_array_equal(np.asarray(found.astype(jnp.float32)).T, golden["again"])


@pytest.mark.parametrize("name", ["tiny-random", "tiny-random-qwen2", "tiny-random-gemma3", "tiny-random-moe"])
@pytest.mark.parametrize(("bits", "most"), [("int8", 1e-4), ("nf4", 2e-2)])
def test_predictions_stay_near_in_nats(name, bits, most):
    """Mean KL(float32 || few bits) a token, over every family's switches."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
    whole, few = load(name), load(f"{name}@{bits}")
    log_p, log_q = (jax.nn.log_softmax(m.logits(tokens)) for m in (whole, few))
    assert 0 < float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))) <= most
    assert few.fingerprint != whole.fingerprint and in_few_bits(few.params) and not in_few_bits(whole.params)
    assert inspect(f"{name}@{bits}")["width"] == whole.config.width


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_it_is_the_model_of_its_own_floats(bits):
    """Metamorphic: logits, an adapter's gradient and decoding are those of the weights that the codes stand for."""
    few = load(f"tiny-random@{bits}")
    same = replace(few, params=floats(few.params))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    adapter = lora(few.config, rank=2, alpha=4.0, key=jax.random.key(0))
    gradients = [
        jax.grad(lambda a, m=m: jnp.mean(jax.nn.logsumexp(m.logits(tokens, adapter=a), axis=-1)))(adapter)
        for m in (few, same)
    ]
    for x, y in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    np.testing.assert_allclose(few.logits(tokens), same.logits(tokens), rtol=0, atol=1e-5)
    texts = [np.asarray(generate(bind(m), [[1, 2, 3]], new_tokens=8, stop=300).tokens) for m in (few, same)]
    np.testing.assert_array_equal(*texts)


def test_an_adapter_is_trained_on_it_and_exported(tmp_path):
    """The loss falls, and the merged folder holds what the codes stand for, with the adapter in it."""
    config = load_config(TINY, ["model.source=tiny-random@nf4", "start.steps=1", "arms.sft.steps=12"])
    solution = aif.fit(config, arm="sft")
    lines = solution.provenance["log"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    model = load("tiny-random@nf4")
    assert solution.provenance["weights"] == model.fingerprint
    assert export_merged(model, solution.adapter, tmp_path / "m") < 1e-4
    assert not in_few_bits(read_folder(tmp_path / "m")[1])


def test_what_is_frozen_in_few_bits_is_not_trained_whole():
    config = load_config(TINY, ["model.source=tiny-random@int8", "adapter.kind=full"])
    with pytest.raises(BadInput, match="weights of tiny-random@int8 are frozen in few bits; take lora"):
        aif.fit(config, arm="sft")


def test_names_that_are_none():
    with pytest.raises(BadInput, match="tiny-random@int3"):
        load("tiny-random@int3")
    with pytest.raises(BadInput, match="an input of 7 cannot be stored"):
        quantised(jnp.ones((2, 7, 3)), "nf4")
