"""`aif direction ...`: every verb on the random model, and one line with exit status 2 for what is wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from aif.adapter import lora, steering_vector
from aif.checkpoint import save_arrays
from aif.directions import load_direction
from aif.models.hub import load

TINY = str(Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml")
MODEL = ("--model", "tiny-random")


@pytest.fixture
def call(call):
    """`aif direction ...` in this process: its exit status and what it wrote."""
    return partial(call, "direction")


@pytest.fixture
def done(call):
    def run(*words) -> str:
        status, out, err = call(*words)
        assert status == 0, err
        return out

    return run


@pytest.fixture
def adapters(tmp_path):
    """A rank-1 adapter and a vector as training leaves them."""
    config = load("tiny-random").config
    rank1 = lora(config, rank=1, alpha=1.0, targets=["down"], layers=[1], key=jax.random.key(0))
    rank1["down"]["b"] = rank1["down"]["b"] + 0.1
    vector = steering_vector(config, layers=[1])
    vector["vector"]["u"] = vector["vector"]["u"] + 0.2
    for name, tree in (("rank1", rank1), ("vector", vector)):
        save_arrays(tmp_path / f"{name}.safetensors", tree, {})
    return tmp_path / "rank1.safetensors", tmp_path / "vector.safetensors"


def test_extract_show_compare_export_import(done, refused, adapters, tmp_path):
    """One file of every kind; a control vector comes back with the unit its doses need."""
    rank1, vector = adapters
    made = {}
    for kind, extra in (
        ("contrast", ["--pooling", "token"]),
        ("pca", ["--tokens", "last", "--layer", "1"]),
        ("trained", ["--adapter", vector]),
        ("down", ["--adapter", rank1]),
        ("shift", ["--adapter", vector]),
    ):
        made[kind] = tmp_path / f"{kind}.safetensors"
        out = done("extract", TINY, "direction.rows=2", "--kind", kind, "--out", made[kind], *extra)
        assert f"direction: {made[kind]} (" in out
        about = load_direction(made[kind]).provenance
        assert {"model", "weights", "site", "layer", "method", "tokens_pooled", "data", "sign", "norm_unit"} <= set(
            about
        )
        assert {"norms", "operation", "token_scope"} <= set(about)
    np.testing.assert_allclose(load_direction(made["shift"]).vector[1], 0.2, atol=1e-4)
    shown = done("show", made["pca"])
    assert "paired PCA" in shown and "last token of the response" in shown and "in residual norms" in shown
    compared = done("compare", made["trained"], made["shift"], made["contrast"])
    assert "    1  +1.000" in compared and "unrelated directions: about +-0.125" in compared
    gguf = tmp_path / "v.gguf"
    assert "(block 1)" in done("export", made["contrast"], "--out", gguf, "--dose", "0.5", *MODEL)
    back = tmp_path / "back.safetensors"
    done("import", gguf, "--out", back, *MODEL)
    one, two = (load_direction(p) for p in (made["contrast"], back))
    assert len(two.provenance["norms"]) == 2 and two.provenance["weights"] == one.provenance["weights"]
    cosine = np.dot(one.vector[1], two.vector[1]) / np.linalg.norm(one.vector[1]) / np.linalg.norm(two.vector[1])
    assert cosine == pytest.approx(1.0, abs=1e-5)
    done("export", made["contrast"], "--to", "weights", "--out", tmp_path / "model", *MODEL)
    assert load(str(tmp_path / "model")).config.tied is False
    refused("export", made["contrast"], "--out", gguf, "--model", "tiny-random:1", line="extracted from other weights")
    refused("export", made["contrast"], "--out", gguf, "--layer", "0", *MODEL, line="no place for block 0")
    refused("import", gguf, "--model", "tiny-random:1", line="made on other weights")
    refused("import", made["contrast"], *MODEL, line="not a GGUF file")
    refused("compare", made["contrast"], line="one file has nothing to be compared with")
    weights = ("export", made["contrast"], "--to", "weights", "--out", tmp_path / "x", *MODEL)
    refused(*weights, "--dose", "1", line="takes the direction of one layer and no dose")
    refused(*weights, "--layer", "7", line="--layer: layer 7 is out of range")
    refused("extract", TINY, "--kind", "o", "--adapter", rank1, line="holds down and not 'o'")


def test_pairs_of_raw_texts(done, refused, tmp_path):
    file, out = tmp_path / "pairs.jsonl", tmp_path / "p.safetensors"
    file.write_text('{"positive": "yes", "negative": "no"}\n' * 2)
    assert "paired PCA, layer 1" in done("pairs", file, "--out", out, *MODEL)
    assert load_direction(out).provenance["pairs"] == 2
    refused("pairs", file, "--layer", "5", *MODEL, line="--layer: layer 5 is out of range")
    refused("pairs", tmp_path / "none.jsonl", *MODEL, line="none.jsonl")


def test_fit_tells_what_is_read_and_moved(done, refused, tmp_path):
    every = ("corpus.train=[train,heldout,heldout_domain]", "direction.rows=8")
    out = done("fit", TINY, *every, "--out", tmp_path / "p.safetensors", "--folds", "3", "--causal", "0")
    assert out.count("[") >= 4 and "layer 0: " in out and "ablation removes" in out
    found = load_direction(tmp_path / "p.safetensors")
    assert found.kind == "probe" and len(found.provenance["bias"]) == 2 and found.provenance["what"] == "discernment"
    refused("fit", TINY, "direction.rows=4", "--folds", "2", "--causal", "0", line="4 prompts cannot be split in three")
    refused("fit", TINY, "--causal", "1", line="layer 1 has no later layer for a reader")
    refused("fit", TINY, "--dimension", "playfullness", line="no such dimension, did you mean 'playfulness'?")
    refused("fit", TINY, "corpus.target=nothing", line="one of the two classes has no response")
    refused("extract", TINY, "--layer", "2", line="--layer: layer 2 is out of range; the model has layers 0..1")
    refused("extract", TINY, "--kind", "trained", line="name its file with --adapter")
