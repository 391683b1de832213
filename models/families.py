"""Sizes and names as data: what a `config.json` says, what Hugging Face calls each weight, and the random models.

Only numbers and known names are read from a `config.json`; `auto_map` and other pointers to code are never acted on.
"""

from __future__ import annotations

from typing import Any

from aif.types import BadInput

from .decoder import DecoderConfig

FAMILIES = ("llama", "mistral", "qwen2")
BYTE_VOCAB = 259  # 256 bytes and three control tokens: the tokenizer of the random models

SIZES = {
    "tiny-random": DecoderConfig("llama", BYTE_VOCAB, 64, 2, 4, 2, 16, 128, max_position=4096),
    "tiny-random-qwen2": DecoderConfig("qwen2", BYTE_VOCAB, 64, 2, 4, 2, 16, 128, qkv_bias=True, max_position=4096),
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

    Attention windows are not modelled: a model that has one gets a `max_position` no longer than its window, and
    within that length the window hides nothing.

    Args:
      config: the parsed file; both spellings of the rotary settings (`rope_scaling`, `rope_parameters`) are read.
      where: what to call the file in an error.

    Raises:
      BadInput: unsupported family or switch, or values out of range; all problems in one line.
    """
    if not isinstance(config, dict):
        raise BadInput(f"{where}: holds a {type(config).__name__}, not an object; use the model's own config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BadInput(f"{where}: model_type {str(family)[:80]!r} is not supported; use one of {', '.join(FAMILIES)}")
    problems: list[str] = []
    sizes = _sizes(config, problems)
    theta, scaling = _rope(config, problems)
    eps = _number(config, "rms_norm_eps", 1e-6, problems)
    if not 0 < eps < 1:
        problems.append(f"rms_norm_eps {eps} is not between 0 and 1")
    _switches(config, family, problems)
    if problems:
        raise BadInput(
            f"{where}: {'; '.join(problem[:200] for problem in problems[:10])}; use an unmodified {family} config.json"
        )
    window = _window(config, family)
    return DecoderConfig(
        family=family,
        vocab=sizes["vocab_size"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        ff=sizes["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=eps,
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        max_position=min(sizes["max_position_embeddings"], window or sizes["max_position_embeddings"]),
    )


def _sizes(config: dict[str, Any], problems: list[str]) -> dict[str, int]:
    """The positive integers of a config; a bad one is put on the list of problems and read as 1."""
    read: dict[str, Any] = {key: config.get(key) for key in _LIMITS}
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


def _rope(config: dict[str, Any], problems: list[str]) -> tuple[float, tuple | None]:
    """theta and scaling; transformers 5 keeps both in `rope_parameters`, older files have two keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        problems.append(f"the rotary settings are {rope!r}, not an object")
        return 1.0, None
    theta = _number({**config, **rope}, "rope_theta", 10000.0, problems)
    if theta <= 0:
        problems.append(f"rope_theta {theta} is not positive")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        problems.append(f"rope type {kind!r} is not supported (default, linear and llama3 are)")
        return theta, None
    factor = _number(rope, "factor", None, problems)
    if factor <= 0:
        problems.append(f"rope factor {factor} is not positive")
    if kind == "linear":
        return theta, ("linear", factor)
    low, high = _number(rope, "low_freq_factor", None, problems), _number(rope, "high_freq_factor", None, problems)
    original = _number(rope, "original_max_position_embeddings", None, problems)
    if not problems and not (0 < low < high and original > 0):
        problems.append(f"rope low_freq_factor {low}, high_freq_factor {high}, original length {original} do not order")
    return theta, ("llama3", factor, low, high, original)


def _switches(config: dict[str, Any], family: str, problems: list[str]) -> None:
    """Refuse what would change the computation and is not implemented."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {config['hidden_act']!r} is not supported (silu is)")
    for key in ("attention_bias", "mlp_bias", "rope_interleaved"):
        if config.get(key):
            problems.append(f"{key} is not supported for {family}")
    if config.get("partial_rotary_factor", 1.0) not in (1, None):
        problems.append("partial_rotary_factor is not supported")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings is {config['tie_word_embeddings']!r}, not true or false")
    if config.get("quantization_config"):
        problems.append("the weights are quantised (quantization_config); take the unquantised model")


def _window(config: dict[str, Any], family: str) -> int | None:
    """Length of the attention window; None when the model has none."""
    default = 4096 if family == "mistral" else None
    kinds = config.get("layer_types")
    sliding = family == "mistral" or config.get("use_sliding_window")
    sliding = sliding or (isinstance(kinds, list) and "sliding_attention" in kinds)
    window = config.get("sliding_window", default) if sliding else None
    return window if type(window) is int and window > 0 else None


def hf_names(config: DecoderConfig) -> dict[tuple[str, ...], str]:
    """Path of every leaf in our parameters -> template of its Hugging Face name.

    A leaf under "layers" is stacked over L, one tensor a layer: `{i}` is the layer. A leaf named "w" is `[in, out]`
    here and `[out, in]` there.
    """
    block = "model.layers.{i}."
    names: dict[tuple[str, ...], str] = {
        ("embed",): "model.embed_tokens.weight",
        ("norm",): "model.norm.weight",
        ("layers", "attn_norm"): block + "input_layernorm.weight",
        ("layers", "mlp_norm"): block + "post_attention_layernorm.weight",
    }
    for target in ("q", "k", "v", "o", "gate", "up", "down"):
        part = "self_attn" if target in "qkvo" else "mlp"
        names["layers", target, "w"] = f"{block}{part}.{target}_proj.weight"
        if config.qkv_bias and target in "qkv":
            names["layers", target, "b"] = f"{block}{part}.{target}_proj.bias"
    if not config.tied:
        names[("head",)] = "lm_head.weight"
    return names
