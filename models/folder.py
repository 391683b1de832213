"""A model as a Hugging Face folder: config.json, weights as safetensors and the tokenizer's files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aif.types import BadInput, Params

from .decoder import DecoderConfig, shapes
from .names import hf_names
from .weights import tensors_of

MAX_SHARD = "5GB"
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


def write_folder(
    folder: Path, config: DecoderConfig, params: Params, tokenizer: Any, *, max_shard: int | str = MAX_SHARD
) -> None:
    """Write float32 weights that transformers loads: one file, or shards with their index, one in memory at a time.

    Args:
      max_shard: bytes of a shard at most, as a number or as in "5GB"; a tensor that is larger has one of its own.

    Raises:
      BadInput: the folder is not empty, the family has no place in this writer, or the size is none.
    """
    if config.family not in _CLASSES:
        raise BadInput(f"{folder}: models of family {config.family} cannot be written; there are {', '.join(_CLASSES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is not an empty folder; name a new one")
    from safetensors.numpy import save_file

    places = _places(config)
    split = _split(config, places, max_shard)
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        save_file({name: _tensor(places[name], params) for name in names}, folder / file, metadata={"format": "pt"})
    if len(split.filename_to_tensors) > 1:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
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


class _Part(NamedTuple):
    """Rows of a stored tensor: `leaf[at]` of our parameters, plus `shift`."""

    path: tuple[str, ...]
    at: tuple[int, ...]
    shift: float


def _places(config: DecoderConfig) -> dict[str, list[_Part]]:
    """Hugging Face name -> the parts that it is made of, from its first row on."""
    found: dict[str, dict[int, _Part]] = {}
    for path, place in hf_names(config).items():
        for at, name in tensors_of(path, _leaf(shapes(config), path), place):
            found.setdefault(name, {})[place.rows[0] if place.rows else 0] = _Part(path, at, -place.shift)
    return {name: [part for _, part in sorted(parts.items())] for name, parts in found.items()}


def _split(config: DecoderConfig, places: dict[str, list[_Part]], max_shard: int | str) -> Any:
    """Which tensors go into which file."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from huggingface_hub.serialization._base import parse_size_to_int

    size = lambda parts: 4 * sum(prod(_leaf(shapes(config), part.path)[len(part.at) :]) for part in parts)  # noqa: E731
    pattern = "model{suffix}.safetensors"
    try:
        most = parse_size_to_int(max_shard) if isinstance(max_shard, str) else max_shard
        if most < 1:
            raise ValueError
    except ValueError:
        raise BadInput(f"max shard {max_shard!r}: is no size; write one as in 5GB or 500MB") from None
    return split_state_dict_into_shards_factory(
        places, get_storage_size=size, filename_pattern=pattern, max_shard_size=most
    )


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _tensor(parts: list[_Part], params: Params) -> np.ndarray:
    """A stored tensor; a leaf named "w" is `[out, in]` there."""
    rows = []
    for part in parts:
        value = np.asarray(_leaf(params, part.path)[part.at], np.float32)
        value = value.T if part.path[-1] == "w" else value
        rows.append(value + np.float32(part.shift) if part.shift else value)
    return np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])
