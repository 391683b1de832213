"""A model as a Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from aif.types import BadInput, Params

from .decoder import DecoderConfig
from .families import hf_names

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_folder(folder: Path, config: DecoderConfig, params: Params, tokenizer: Any) -> None:
    """Write float32 weights that transformers loads.

    Raises:
      BadInput: the folder is not empty, or the family has no place in this writer.
    """
    if config.family not in _CLASSES:
        raise BadInput(f"{folder}: models of family {config.family} cannot be written; there are {', '.join(_CLASSES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is not an empty folder; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    save_file(_tensors(config, params), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    (folder / "config.json").write_text(json.dumps(hf_config(config) | special, indent=1))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of these sizes: the inverse of `families.from_hf`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        kind, *values = config.rope_scaling
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": kind, **dict(zip(keys, values, strict=False))}
    return {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ff,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "dtype": "float32",
    }


def _tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Hugging Face name -> array, one tensor a layer; a leaf named "w" is `[out, in]` there."""
    out = {}
    for path, name in hf_names(config).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        value = np.asarray(leaf, np.float32)
        parts = {name.format(i=i): x for i, x in enumerate(value)} if path[0] == "layers" else {name: value}
        out |= {n: np.ascontiguousarray(x.T if path[-1] == "w" else x) for n, x in parts.items()}
    return out
