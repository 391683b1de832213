"""Exports: what is written is read again, and damage is noticed. Torch loads them in `benchmarks/reload.py`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awake
from safetensors.numpy import load_file

from aif import export
from aif.adapter import lora, steering_vector
from aif.errors import BadInput
from aif.models.hub import LM, byte_tokenizer, load
from aif.models.weights import read_folder

FAMILIES = Path(__file__).parent / "golden" / "families"


def family(name: str) -> LM:
    config, params = read_folder(FAMILIES / name)
    return LM(config, jax.tree.map(jnp.asarray, params), byte_tokenizer(), name, name)


def adapted(lm: LM, **how) -> dict:
    return awake(lora(lm.config, rank=2, alpha=4.0, key=jax.random.key(1), **how), jax.random.key(2))


def test_merged_folder_is_a_model_again(lm, adapter, tmp_path):
    assert export.export_merged(lm, adapter, tmp_path / "m", about={"seed": 3}) <= export.TOLERANCE
    again = load(str(tmp_path / "m"))
    tokens = jnp.arange(40)[None]
    np.testing.assert_allclose(again.logits(tokens), lm.logits(tokens, adapter=adapter), rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == 258
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith("---\nbase_model:") and lm.fingerprint in card and "- seed: 3" in card


@pytest.mark.parametrize("name", ["phi3", "mixtral", "gemma2"])
def test_shards_are_the_single_file_in_pieces(tmp_path, name):
    """Reference: transformers' index; every shard within the size, but for a tensor that is larger by itself."""
    model, most = family(name), 20_000
    assert export.export_merged(model, None, tmp_path / "many", max_shard=most) <= 1e-4
    export.export_merged(model, None, tmp_path / "one")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    many = {}
    for file in files:
        part = load_file(tmp_path / "many" / file)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= most
        assert {index["weight_map"][key] for key in part} == {file}
        many |= part
    assert many.keys() == one.keys() and all(np.array_equal(many[key], one[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())


@pytest.mark.parametrize("size", ["5 apples", "-1GB", 0])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_written(lm, tmp_path, size):
    with pytest.raises(BadInput, match="is no size; write one as in 5GB"):
        export.export_merged(lm, None, tmp_path / "m", max_shard=size)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("name", "targets"), [("qwen3", ("q", "down")), ("phi3", ("q", "v", "gate", "o"))])
def test_peft_folder_is_the_adapter_again(tmp_path, name, targets):
    """Keys and shapes are PEFT's; Phi-3's fused layers get one adapter of the ranks together."""
    model = family(name)
    adapter = adapted(model, targets=targets, layers=[1])
    assert export.export_peft(model, adapter, tmp_path / "p") <= export.TOLERANCE
    tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
    own = {"qwen3": ("self_attn.q_proj", 2, 48), "phi3": ("self_attn.qkv_proj", 4, 64)}[name]
    stem = f"base_model.model.model.layers.1.{own[0]}"
    assert tensors[f"{stem}.lora_A.weight"].shape == (own[1], 32)
    assert tensors[f"{stem}.lora_B.weight"].shape == (own[2], own[1])
    settings = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    short = {"qwen3": ["down_proj", "q_proj"], "phi3": ["gate_up_proj", "o_proj", "qkv_proj"]}[name]
    assert settings["target_modules"] == short and settings["peft_type"] == "LORA"
    assert all(float(np.abs(x).max()) == 0 for key, x in tensors.items() if ".0." in key and "lora_B" in key)


def test_what_peft_has_no_place_for_is_refused(lm, tmp_path):
    with pytest.raises(BadInput, match="no place for an adapter of vector"):
        export.export_peft(lm, steering_vector(lm.config), tmp_path / "p")
    model = family("mixtral")
    with pytest.raises(BadInput, match="no place for an adapter of gate, up, down"):
        export.export_peft(model, adapted(model), tmp_path / "p")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(BadInput, match="is not an empty folder"):
        export.export_peft(lm, adapted(lm), tmp_path / "full")


def test_an_export_that_is_not_the_model_is_noticed(lm, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "read_peft", lambda folder, config: {})
    with pytest.raises(RuntimeError, match="other logits"):
        export.export_peft(lm, adapter, tmp_path / "p")
