"""Control vectors as GGUF, ablation as weights, and the folder that other engines load."""

from __future__ import annotations

from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.directions.exports import ablated, control_vector, read_control_vector
from aif.errors import BadInput
from aif.models.decoder import forward, logits
from aif.models.folder import hf_config, write_folder
from aif.models.hub import load
from aif.models.weights import read_folder
from aif.steering import project_out
from aif.types import Direction

TOKENS = jnp.arange(12)[None] % 30


@pytest.fixture
def direction(lm):
    v = jax.random.normal(jax.random.key(1), (2, 64))
    return Direction(v, "contrast", {"layer": 1, "norms": [2.0, 3.0], "model": lm.source, "weights": lm.fingerprint})


# Control vectors


def test_a_control_vector_comes_back(direction, lm, tmp_path):
    path = tmp_path / "v.gguf"
    assert control_vector(direction, path, config=lm.config) == [1]
    found = read_control_vector(path, lm.config)
    np.testing.assert_array_equal(found.vector[1], direction.vector[1])
    assert not found.vector[0].any() and found.kind == "contrast"
    about = found.provenance
    assert (about["layer"], about["layers"], about["operation"], about["weights"]) == (1, [1], "add", lm.fingerprint)


def test_the_file_is_what_llama_cpp_reads(direction, lm, tmp_path):
    """The gguf package's own reader: architecture, hint, count, one F32 row per block, numbered by its output."""
    path = tmp_path / "v.gguf"
    control_vector(direction, path, config=lm.config, dose=0.5)
    reader = gguf.GGUFReader(path)
    text = lambda key: bytes(reader.get_field(key).parts[-1]).decode()  # noqa: E731
    assert (text("general.architecture"), text("controlvector.model_hint")) == ("controlvector", "llama")
    assert reader.get_field("controlvector.layer_count").parts[-1][0] == 1
    ((name, data),) = [(t.name, t.data) for t in reader.tensors]
    unit = direction.vector[1] / np.linalg.norm(direction.vector[1])
    assert name == "direction.1"
    np.testing.assert_allclose(data, 0.5 * 3.0 * unit, rtol=1e-5)


def test_what_a_control_vector_cannot_say_is_refused(direction, lm, tmp_path):
    path, about = tmp_path / "v.gguf", direction.provenance
    for change, options, message in (
        ({}, {"layers": [0]}, "no place for block 0 .direction.N is block N's output, N >= 1."),
        ({}, {"layers": [2]}, "export: layer 2 is out of range; the model has layers 0..1"),
        ({"operation": "project"}, {}, "is to project, and llama.cpp would add it; export the ablation as weights"),
        ({"layer": None}, {}, "names no layer"),
        ({"norms": None}, {"dose": 1.0}, "a dose has no unit"),
    ):
        with pytest.raises(BadInput, match=message):
            control_vector(replace(direction, provenance={**about, **change}), path, config=lm.config, **options)
        assert not path.exists()


def foreign(path, architecture="controlvector", hint="llama", tensors=None):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("controlvector.model_hint", hint)
    for name, value in (tensors or {"direction.1": np.ones(64, np.float32)}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_foreign_files_are_refused(lm, tmp_path):
    one = np.ones(64, np.float32)
    for made, message in (
        ({"architecture": "llama"}, "holds a 'llama' model, not a control vector"),
        ({"hint": "gemma2"}, "made for a 'gemma2' model, not for llama"),
        ({"tensors": {"direction.0": one}}, "direction.0 is out of range; .* 1..1"),
        ({"tensors": {"direction.2": one}}, "direction.2 is out of range"),
        ({"tensors": {"blk.1.attn": one}}, "holds 'blk.1.attn', which no control vector has"),
        ({"tensors": {"direction.1": one[:32]}}, r"direction.1 is \[32\] F32, and this model's residual has 64"),
        ({"tensors": {"direction.1": one.astype(np.float16)}}, "F16"),
        ({"tensors": {"direction.1": one * np.nan}}, "a value is not finite"),
    ):
        with pytest.raises(BadInput, match=message):
            read_control_vector(foreign(tmp_path / "f.gguf", **made), lm.config)
    (tmp_path / "f.gguf").write_bytes(b"GGML")
    with pytest.raises(BadInput, match="not a GGUF file"):
        read_control_vector(tmp_path / "f.gguf", lm.config)


def test_repengs_own_files_are_read(lm, tmp_path):
    """What repeng's `export_gguf` writes: no keys of ours."""
    found = read_control_vector(foreign(tmp_path / "r.gguf"), lm.config)
    assert found.kind == "imported" and found.provenance["norm_unit"] == "raw" and "weights" not in found.provenance


# Ablation as weights


def run(config, params, **values):
    out = forward(config, params, TOKENS, tap=lambda h: h, **values)
    return np.asarray(logits(params, out.hidden)), np.asarray(out.taps)


def test_nothing_is_written_along_an_ablated_direction(lm):
    v = np.random.default_rng(0).normal(size=64)
    config, params = ablated(lm.config, lm.params, v)
    scores, taps = run(config, params)
    assert np.abs(taps @ (v / np.linalg.norm(v))).max() < 1e-4 * np.abs(taps).max()
    wide = jnp.broadcast_to(jnp.asarray(v, jnp.float32), (2, 64))
    again, _ = run(config, params, edits=project_out(wide, rows=1, layers=range(2)))
    np.testing.assert_allclose(again, scores, atol=1e-3)
    np.testing.assert_array_equal(params["head"], lm.params["embed"])
    assert lm.config.tied and not config.tied


def test_ablated_weights_are_the_ablated_forward(lm):
    """With embedding and o_proj ablated, projecting out of every block's output is what ablating down_proj does."""
    v = np.random.default_rng(1).normal(size=64)
    config, params = ablated(lm.config, lm.params, v)
    half = {**params, "layers": {**params["layers"], "down": lm.params["layers"]["down"]}}
    wide = jnp.broadcast_to(jnp.asarray(v, jnp.float32), (2, 64))
    edited, _ = run(config, half, edits=project_out(wide, rows=1, layers=range(2)))
    np.testing.assert_allclose(edited, run(config, params)[0], atol=1e-3)


def test_the_folder_comes_back(lm, tmp_path):
    config, params = ablated(lm.config, lm.params, np.ones(64))
    write_folder(tmp_path / "out", config, params, lm.tokenizer)
    again, read = read_folder(tmp_path / "out")
    assert replace(again, max_position=config.max_position) == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    whole = load(str(tmp_path / "out"))
    text = "<|im_start|>user\nHi — 12<|im_end|>"
    assert whole.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert whole.tokenizer.chat_template == lm.tokenizer.chat_template
    with pytest.raises(BadInput, match="is not an empty folder"):
        write_folder(tmp_path / "out", config, params, lm.tokenizer)


def test_a_model_that_cannot_be_written_is_refused(lm, tmp_path):
    with pytest.raises(BadInput, match="family mamba cannot be written"):
        write_folder(tmp_path / "g", replace(lm.config, family="mamba"), lm.params, lm.tokenizer)
    normed = replace(lm.config, family="gemma2", post_norms=True)
    with pytest.raises(BadInput, match="gemma2 norms what o_proj and down_proj write"):
        ablated(normed, lm.params, np.ones(64))
    for v in (np.zeros(64), np.full(64, np.nan), np.ones(32)):
        with pytest.raises(BadInput, match="must be 64 finite values"):
            ablated(lm.config, lm.params, v)


def test_rope_scaling_is_kept(toy):
    from aif.models.families import from_hf

    config = replace(toy.config, family="llama", qkv_bias=False)
    assert from_hf(hf_config(config), "x") == config
