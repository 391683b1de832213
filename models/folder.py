"""A model as a Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from aif.types import BadInput, Params

from .decoder import DecoderConfig
from .names import hf_names
from .weights import tensors_of

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


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
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": _rope(config),
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "dtype": "float32",
        **_window(config),
        **(_gemma(config) if config.family.startswith("gemma") else {"hidden_act": "silu"}),
        **(_experts(config) if config.experts else {}),
    }


def _rope(config: DecoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_dim is not None:
        rope["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.rope_scaling is not None and config.rope_scaling[0] == "longrope":
        _, factors, size = config.rope_scaling  # the model is held to its original length: both sets of factors are one
        rope |= {"rope_type": "longrope", "short_factor": list(factors), "long_factor": list(factors)}
        rope |= {"attention_factor": size, "original_max_position_embeddings": config.max_position}
    elif config.rope_scaling is not None:
        kind, *values = config.rope_scaling
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": kind, **dict(zip(keys, values, strict=False))}
    if config.family != "gemma3_text":
        return rope
    local = {"rope_type": "default", "rope_theta": config.local_theta or 1e4}
    return {"full_attention": rope, "sliding_attention": local}


def _window(config: DecoderConfig) -> dict[str, Any]:
    if not config.window:
        return {"sliding_window": None}
    kinds = ["sliding_attention" if local else "full_attention" for local in config.local]
    named = {"layer_types": kinds} if config.family in ("qwen2", "qwen3", "gemma2", "gemma3_text") else {}
    return {"sliding_window": config.window, "use_sliding_window": True, **named}


def _gemma(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scale**-2),  # transformers wants an integer
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
    }


def _experts(config: DecoderConfig) -> dict[str, Any]:
    if config.family == "mixtral":
        return {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
    own = {"num_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
    return own | {"moe_intermediate_size": config.ff, "norm_topk_prob": config.norm_experts, "decoder_sparse_step": 1}


def _tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Hugging Face name -> array, one tensor a layer; a leaf named "w" is `[out, in]` there."""
    parts: dict[str, dict[int, np.ndarray]] = {}  # name -> first row -> rows
    for path, place in hf_names(config).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        leaf = np.asarray(leaf, np.float32)
        for at, name in tensors_of(path, leaf.shape, place):
            value = leaf[at].T if path[-1] == "w" else leaf[at]
            value = value - np.float32(place.shift) if place.shift else value
            parts.setdefault(name, {})[place.rows[0] if place.rows else 0] = value
    return {name: np.ascontiguousarray(np.concatenate([x for _, x in sorted(p.items())])) for name, p in parts.items()}
