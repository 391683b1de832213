"""Every family agrees with transformers' torch implementation (`golden/make_logits.py`), and with itself."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awake

from aif.adapter import lora, merge
from aif.models.decoder import TARGETS, empty_cache, forward, logits
from aif.models.families import from_hf
from aif.models.folder import write_folder
from aif.models.hub import byte_tokenizer
from aif.models.weights import read_folder
from aif.steering import add

GOLDEN = Path(__file__).parent / "golden" / "families"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

_jitted = jax.jit(forward, static_argnums=0, static_argnames=("tap", "compute_dtype"))


def residual(h):
    return h


@cache
def model(name: str):
    config, params = read_folder(GOLDEN / name)
    return config, jax.tree.map(jnp.asarray, params), np.load(GOLDEN / f"{name}.npz")


@cache
def adapted(name: str):
    config = model(name)[0]
    return awake(lora(config, rank=2, alpha=4.0, key=jax.random.key(1)), jax.random.key(2), 0.3)


@pytest.mark.parametrize("name", NAMES)
def test_logits_residuals_and_steering_agree_with_transformers(name):
    """Without edits (of strength zero, which is one program for both) and with `push` added to the output of block 0,
    which in torch is a hook."""
    config, params, golden = model(name)
    push = jnp.zeros((config.layers, config.width)).at[0].set(golden["push"])
    for dose, wanted in ((0.0, "logits"), (1.0, "steered")):
        edits = add(push, dose * jnp.ones(2), jnp.linalg.norm(push, axis=-1), layers=[0])
        output = _jitted(config, params, golden["tokens"], edits=edits, tap=residual)
        np.testing.assert_allclose(logits(params, output.hidden, config.logit_cap), golden[wanted], rtol=0, atol=2e-4)
        if not dose:
            np.testing.assert_allclose(output.taps, golden["hidden"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_in_nats(name):
    """Mean KL(float32 torch || our bfloat16 matrix products) <= 1e-2 nats a token."""
    config, params, golden = model(name)
    hidden = _jitted(config, params, golden["tokens"], compute_dtype=jnp.bfloat16).hidden
    log_p = jax.nn.log_softmax(golden["logits"])
    log_q = jax.nn.log_softmax(logits(params, hidden, config.logit_cap))
    assert float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))) <= 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_cached_greedy_generation_is_that_of_transformers(name):
    """The tokens read at once and continued one by one: same choices as generate(), same residuals as uncached."""
    config, params, golden = model(name)
    tokens, wanted = golden["tokens"], golden["generated"]
    cache, steps = empty_cache(config, 2, 32), []
    for piece in (tokens, *np.split(wanted[:, :-1], 11, axis=1)):
        out = _jitted(config, params, piece, cache=cache)
        cache, steps = out.cache, [*steps, out.hidden]
    got = jnp.concatenate(steps, axis=1)
    whole = np.concatenate([tokens, wanted[:, :-1]], axis=1)
    np.testing.assert_allclose(got, _jitted(config, params, whole).hidden, rtol=0, atol=5e-5)
    choices = logits(params, got, config.logit_cap)[:, 19:, :95].argmax(-1)  # 95 ends a text, and was not allowed to
    np.testing.assert_array_equal(choices, wanted)


@pytest.mark.parametrize("name", ["gemma2", "phi4", "qwen3_moe"])
def test_an_adapter_is_its_merged_weights(name):
    """Every target of the family changes the logits, and W + scale A B gives those of the adapter."""
    config, params, golden = model(name)
    adapter, tokens = adapted(name), golden["tokens"]
    assert set(adapter) == set(TARGETS)
    got = _jitted(config, params, tokens, adapter=adapter).hidden
    base = _jitted(config, merge(config, params, {}), tokens).hidden
    np.testing.assert_allclose(_jitted(config, merge(config, params, adapter), tokens).hidden, got, rtol=0, atol=1e-4)
    for target in TARGETS:
        only = {n: {**t, "scale": t["scale"] * (n == target)} for n, t in adapter.items()}
        assert float(jnp.abs(_jitted(config, params, tokens, adapter=only).hidden - base).max()) > 1e-3, target


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_packing_and_branches_change_nothing(name):
    """Two texts in one row are the two alone; an answer sees its prompt and no sibling, windows counting positions."""
    config, params, golden = model(name)
    a, b = golden["tokens"]
    alone = [_jitted(config, params, x[None]).hidden[0] for x in (np.concatenate([a[:12], a[15:]]), b)]
    tokens = jnp.array([[*a, *b]])  # a prompt of 12 with answers of 3 and 5, and another text
    layout = {
        "positions": jnp.array([[*range(12), *range(12, 15), *range(12, 17), *range(20)]]),
        "segments": jnp.array([[1] * 20 + [2] * 20]),
        "branches": jnp.array([[0] * 12 + [1] * 3 + [2] * 5 + [0] * 20]),
    }
    got = _jitted(config, params, tokens, **layout).hidden[0]
    np.testing.assert_allclose(jnp.concatenate([got[:12], got[15:20]]), alone[0], rtol=0, atol=5e-5)
    np.testing.assert_allclose(got[20:], alone[1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_gradients_exist_everywhere(name):
    """Every weight of the blocks and every factor of the adapter gets a finite gradient that is not zero."""
    config, params, golden = model(name)
    weights = jax.random.normal(jax.random.key(4), (2, 20, config.width))

    def loss(params, adapter):
        return jnp.sum(
            weights * forward(config, params, jnp.asarray(golden["tokens"]), adapter=adapter, remat="dots").hidden
        )

    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, adapted(name))):
        largest = float(jnp.abs(g).max())
        assert np.isfinite(largest) and (largest > 0) == (path[-1].key not in ("scale", "head")), path


@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_reads_as_it_was(name, tmp_path):
    """`write_folder` undoes what reading did: shifted norms, fused tensors, experts one by one, every switch."""
    config, params, _ = model(name)
    write_folder(tmp_path / "out", config, params, byte_tokenizer())
    again, read = read_folder(tmp_path / "out")
    assert again == config
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-7), read, params)


# --- config.json


def written(name: str, **changes) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def test_both_spellings_of_gemma3s_rotary_settings():
    new = written("gemma3")
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1000.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    old |= {"sliding_window_pattern": 3}
    assert from_hf(old, "old") == from_hf(new, "new")


def test_both_spellings_of_phis_long_rotary_settings():
    new = written("phi4")
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "partial_rotary_factor": rope.pop("partial_rotary_factor")}
    rope.pop("original_max_position_embeddings", None)
    assert from_hf(old | {"rope_scaling": rope}, "old") == from_hf(new, "new")


def test_a_window_that_hides_nothing_is_no_window():
    assert from_hf(written("mistral", sliding_window=64), "m").window is None
    assert from_hf(written("mistral", sliding_window=None), "m").window is None
    assert from_hf(written("qwen2", use_sliding_window=False), "q").window is None
    assert from_hf(written("mistral"), "m").local == (True, True)
    assert from_hf(written("qwen2"), "q").local == (False, True)


BAD = {
    "experts": ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, not an integer from 1 to 4"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, "without experts"),
    "window": ("mistral", {"sliding_window": -1}, "sliding_window is -1"),
    "layer types": ("gemma3", {"layer_types": ["full_attention"]}, "layer_types"),
    "scalar": ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    "cap": ("gemma2", {"final_logit_softcapping": "no"}, "final_logit_softcapping"),
    "activation": ("gemma2", {"hidden_activation": "gelu"}, "gelu"),
    "factors": ("phi4", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor"),
    "part": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "partial_rotary_factor"),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
}


@pytest.mark.parametrize("case", BAD)
def test_config_that_is_refused(case):
    from aif.errors import BadInput

    name, change, words = BAD[case]
    with pytest.raises(BadInput, match=words):
        from_hf(written(name, **change), "x/config.json")
