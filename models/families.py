"""Families as data: what a `config.json` says, with each family's defaults and switches, and the random models.

Only numbers and known names are read from a `config.json`; `auto_map` and other pointers to code are never acted on.
"""

from __future__ import annotations

import math
from typing import Any

from aif.types import BadInput

from .decoder import DecoderConfig

BYTE_VOCAB = 259  # 256 bytes and three control tokens: the tokenizer of the random models

_GEMMA = {"act": "gelu", "post_norms": True}
SWITCHES: dict[str, dict[str, Any]] = {  # family -> what its models all have
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"qk_norm": True},
    "phi3": {},
    "mixtral": {},
    "qwen3_moe": {"qk_norm": True},
}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {  # family -> keys that its config.json may leave out
    "mistral": {"sliding_window": 4096},
    "gemma2": _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA_DEFAULTS | {"sliding_window_pattern": 6, "rope_local_base_freq": 1e4, "rope_theta": 1e6},
    "phi3": {"rms_norm_eps": 1e-5},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
}

SIZES = {
    "tiny-random": DecoderConfig("llama", BYTE_VOCAB, 64, 2, 4, 2, 16, 128, max_position=4096),
    "tiny-random-qwen2": DecoderConfig("qwen2", BYTE_VOCAB, 64, 2, 4, 2, 16, 128, qkv_bias=True, max_position=4096),
    "tiny-random-gemma3": DecoderConfig(
        *("gemma3_text", BYTE_VOCAB, 64, 2, 4, 2, 16, 128, 1e6),
        **{**SWITCHES["gemma3_text"], "embed_scale": 8.0, "max_position": 4096},
        **{"window": 32, "local": (True, False), "local_theta": 1e4},
    ),
    "tiny-random-moe": DecoderConfig(
        *("qwen3_moe", BYTE_VOCAB, 64, 2, 4, 2, 16, 48),
        **{"qk_norm": True, "max_position": 4096, "experts": 4, "experts_per_token": 2},
    ),
}

_LIMITS = {  # HF key -> largest value that any published model comes near
    "vocab_size": 1 << 21,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 26,
}


def from_hf(config: dict[str, Any], where: str) -> DecoderConfig:
    """The sizes and switches of a Hugging Face `config.json`, checked before anything is allocated.

    Args:
      config: the parsed file; both spellings of the rotary settings (`rope_scaling`, `rope_parameters`) are read.
      where: what to call the file in an error.

    Raises:
      BadInput: unsupported family or switch, or values out of range; all problems in one line.
    """
    if not isinstance(config, dict):
        raise BadInput(f"{where}: holds a {type(config).__name__}, not an object; use the model's own config.json")
    family = config.get("model_type")
    if family not in SWITCHES:
        raise BadInput(f"{where}: model_type {str(family)[:80]!r} is not supported; use one of {', '.join(SWITCHES)}")
    config = {**DEFAULTS.get(family, {}), **config}
    problems: list[str] = []
    sizes = _sizes(config, problems)
    values = {**SWITCHES[family], **_rope(config, family, sizes, problems), **_attention(config, family, problems)}
    values |= _experts(config, family, problems)
    eps = _number(config, "rms_norm_eps", 1e-6, problems)
    if not 0 < eps < 1:
        problems.append(f"rms_norm_eps {eps} is not between 0 and 1")
    _refused(config, family, problems)
    values |= _window(config, family, sizes, values["max_position"], problems)
    if problems:
        raise BadInput(
            f"{where}: {'; '.join(problem[:200] for problem in problems[:10])}; use an unmodified {family} config.json"
        )
    gemma = family.startswith("gemma")
    return DecoderConfig(
        **{
            "family": family,
            "vocab": sizes["vocab_size"],
            "width": sizes["hidden_size"],
            "layers": sizes["num_hidden_layers"],
            "heads": sizes["num_attention_heads"],
            "kv_heads": sizes["num_key_value_heads"],
            "head_dim": sizes["head_dim"],
            "ff": sizes["intermediate_size"],
            "norm_eps": eps,
            "tied": config.get("tie_word_embeddings", False),
            "embed_scale": math.sqrt(sizes["hidden_size"]) if gemma else 1.0,
            **values,
        }
    )


def _sizes(config: dict[str, Any], problems: list[str]) -> dict[str, int]:
    """The positive integers of a config; a bad one is put on the list of problems and read as 1."""
    read: dict[str, Any] = {key: config.get(key) for key in _LIMITS}
    if config.get("moe_intermediate_size") is not None:
        read["intermediate_size"] = config["moe_intermediate_size"]
    if read["num_key_value_heads"] is None:
        read["num_key_value_heads"] = read["num_attention_heads"]
    if read["max_position_embeddings"] is None:
        read["max_position_embeddings"] = 2048
    width, heads = read["hidden_size"], read["num_attention_heads"]
    if read["head_dim"] is None and type(width) is int and type(heads) is int and heads > 0:
        if width % heads:
            problems.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        read["head_dim"] = max(width // heads, 1)
    for key, limit in _LIMITS.items():
        if type(read[key]) is not int or not 1 <= read[key] <= limit:
            problems.append(f"{key} is {read[key]!r}, not an integer from 1 to {limit}")
            read[key] = 1
    if read["num_attention_heads"] % read["num_key_value_heads"]:
        problems.append(
            f"num_attention_heads {read['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {read['num_key_value_heads']}"
        )
    if read.get("head_dim", 0) % 2 and not problems:
        problems.append(f"head_dim {read['head_dim']} is odd, and rotary embeddings turn pairs")
    return read


def _number(config: dict[str, Any], key: str, default: float | None, problems: list[str]) -> float:
    """A finite number of a config; a bad one is put on the list of problems and read as 1."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 < value < 1e30:
        problems.append(f"{key} is {value!r}, not a finite number")
        return 1.0
    return float(value)


def _integer(config: dict[str, Any], key: str, limit: int, problems: list[str]) -> int:
    """An integer from 1 to `limit`; a bad one is put on the list of problems and read as 1."""
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= limit:
        problems.append(f"{key} is {value!r}, not an integer from 1 to {limit}")
        return 1
    return value


def _rope(config: dict[str, Any], family: str, sizes: dict[str, int], problems: list[str]) -> dict[str, Any]:
    """The rotary settings; transformers 5 keeps them in `rope_parameters`, older files under keys of their own."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: dict[str, Any] = {"max_position": sizes["max_position_embeddings"]}
    if not isinstance(rope, dict):
        problems.append(f"the rotary settings are {rope!r}, not an object")
        return found
    if family == "gemma3_text":
        local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
        own = local if isinstance(local, dict) else {"rope_theta": config.get("rope_local_base_freq")}
        found["local_theta"] = _number(own, "rope_theta", 1e4, problems)
        rope = rope if isinstance(rope, dict) else {}
    merged = {**config, **rope}
    theta = _number(merged, "rope_theta", 10000.0, problems)
    if theta <= 0 or found.get("local_theta", 1) <= 0:
        problems.append(f"rope_theta {theta} is not positive")
    part = _number(merged, "partial_rotary_factor", 1.0, problems)
    turned = int(sizes["head_dim"] * part)
    if not 0 < part <= 1 or turned % 2 or not turned:
        problems.append(f"partial_rotary_factor {part} leaves {turned} of {sizes['head_dim']} dimensions to turn")
    found |= {"rope_theta": theta, "rotary_dim": turned if part < 1 else None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("longrope", "su"):
        return found | _longrope(config, rope, turned, sizes, problems)
    return found | {"rope_scaling": _scaling(rope, kind, problems)}


def _scaling(rope: dict[str, Any], kind: str, problems: list[str]) -> tuple | None:
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        problems.append(f"rope type {str(kind)[:40]!r} is not supported (default, linear, llama3 and longrope are)")
        return None
    factor = _number(rope, "factor", None, problems)
    if factor <= 0:
        problems.append(f"rope factor {factor} is not positive")
    if kind == "linear":
        return ("linear", factor)
    low, high = _number(rope, "low_freq_factor", None, problems), _number(rope, "high_freq_factor", None, problems)
    original = _number(rope, "original_max_position_embeddings", None, problems)
    if not problems and not (0 < low < high and original > 0):
        problems.append(f"rope low_freq_factor {low}, high_freq_factor {high}, original length {original} do not order")
    return ("llama3", factor, low, high, original)


def _longrope(
    config: dict[str, Any], rope: dict[str, Any], turned: int, sizes: dict[str, int], problems: list[str]
) -> dict[str, Any]:
    """Long rotary embeddings as they are within the original length, to which the model is held: one set of factors."""
    merged = {"original_max_position_embeddings": sizes["max_position_embeddings"], **config, **rope}
    original = _integer(merged, "original_max_position_embeddings", 1 << 26, problems)
    short = rope.get("short_factor")
    numbers = short if isinstance(short, list) and len(short) == turned // 2 else []
    if not numbers or not all(type(x) in (int, float) and 0 < x < 1e30 for x in numbers):
        problems.append(f"short_factor is not a list of {turned // 2} positive numbers")
        numbers = [1.0]
    factor = _number(rope, "factor", sizes["max_position_embeddings"] / original, problems)
    own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    size = _number(rope, "attention_factor", own, problems)
    scaling = ("longrope", tuple(float(x) for x in numbers), size)
    return {"rope_scaling": scaling, "max_position": min(original, sizes["max_position_embeddings"])}


def _attention(config: dict[str, Any], family: str, problems: list[str]) -> dict[str, Any]:
    """Scale of attention scores, and the caps of scores and logits."""
    if not family.startswith("gemma"):
        return {}
    scalar = _number(config, "query_pre_attn_scalar", None, problems)
    if scalar <= 0:
        problems.append(f"query_pre_attn_scalar {scalar} is not positive")
        scalar = 1.0
    found: dict[str, Any] = {"attention_scale": scalar**-0.5}
    for ours, key in (("attention_cap", "attn_logit_softcapping"), ("logit_cap", "final_logit_softcapping")):
        if config.get(key) is not None:
            found[ours] = _number(config, key, None, problems)
            if found[ours] <= 0:
                problems.append(f"{key} {found[ours]} is not positive")
    return found


def _experts(config: dict[str, Any], family: str, problems: list[str]) -> dict[str, Any]:
    if family not in ("mixtral", "qwen3_moe"):
        return {}
    key = "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
    count = _integer(config, key, 1 << 12, problems)
    chosen = _integer(config, "num_experts_per_tok", count, problems)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        problems.append("layers without experts between layers with experts are not supported")
    norm = family == "mixtral" or bool(config.get("norm_topk_prob", False))
    return {"experts": count, "experts_per_token": chosen, "norm_experts": norm}


def _refused(config: dict[str, Any], family: str, problems: list[str]) -> None:
    """Refuse what would change the computation and is not implemented."""
    wanted = ("gelu_pytorch_tanh",) if family.startswith("gemma") else ("silu", "swish")
    act = config.get("hidden_activation") or config.get("hidden_act") or wanted[0]
    if act not in wanted:
        problems.append(f"hidden_act {act!r} is not supported ({wanted[0]} is)")
    for key in ("attention_bias", "mlp_bias", "rope_interleaved", "use_bidirectional_attention"):
        if config.get(key):
            problems.append(f"{key} is not supported for {family}")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings is {config['tie_word_embeddings']!r}, not true or false")
    if config.get("quantization_config"):
        problems.append("the weights are quantised (quantization_config); take the unquantised model")


def _window(
    config: dict[str, Any], family: str, sizes: dict[str, int], longest: int, problems: list[str]
) -> dict[str, Any]:
    """The attention window and which layers have one; nothing where it is not shorter than the model's texts."""
    window = config.get("sliding_window")
    if window is None or family.startswith("qwen") and not config.get("use_sliding_window"):
        return {"local_theta": None}
    window = _integer(config, "sliding_window", 1 << 30, problems)
    layers, kinds = sizes["num_hidden_layers"], config.get("layer_types")
    if isinstance(kinds, list) and family not in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        known = {"sliding_attention", "full_attention"}
        if len(kinds) != layers or not all(isinstance(kind, str) and kind in known for kind in kinds):
            problems.append(f"layer_types are not {layers} of {', '.join(sorted(known))}")
        local = tuple(kind == "sliding_attention" for kind in kinds)
    elif family.startswith("gemma"):
        every = 2 if family == "gemma2" else _integer(config, "sliding_window_pattern", 1 << 10, problems)
        local = tuple((i + 1) % every != 0 for i in range(layers))
    elif family in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        local = tuple(type(first) is int and i >= first for i in range(layers))
    else:
        local = (True,) * layers
    needed = any(local) and (window < longest or family == "gemma3_text")  # Gemma 3's local layers turn differently
    return {"window": window, "local": local} if needed else {"local_theta": None}
