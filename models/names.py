"""Names as data: where every leaf of our parameters lies in a Hugging Face folder or in a GGUF file.

A leaf under "layers" is stacked over L, one tensor a layer: `{i}` is the layer, and `{e}` the expert of a leaf that is
stacked over E as well. A leaf named "w" is `[in, out]` here and `[out, in]` there.
"""

from __future__ import annotations

from typing import NamedTuple

from .decoder import TARGETS, DecoderConfig

Path = tuple[str, ...]


class Place(NamedTuple):
    """The tensor that holds one layer of a leaf: its name, which of its rows (None: all), and what its values lack."""

    name: str
    rows: tuple[int, int] | None = None
    shift: float = 0.0


def hf_names(config: DecoderConfig) -> dict[Path, Place]:
    """Path of every leaf -> its place in a Hugging Face folder.

    Gemma stores a norm's gain as w and multiplies by 1 + w, hence a shift of one; Phi-3 stores q, k, v as one tensor,
    and gate, up as another.
    """
    block, gemma = "model.layers.{i}.", config.family.startswith("gemma")
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms = {"attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm"}
        norms |= {"mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    if config.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    names: dict[Path, Place] = {("embed",): Place("model.embed_tokens.weight")}
    names["norm",] = Place("model.norm.weight", shift=float(gemma))
    names |= {("layers", ours): Place(f"{block}{hf}.weight", shift=float(gemma)) for ours, hf in norms.items()}
    for target in TARGETS:
        part = "self_attn" if target in "qkvo" else "mlp"
        names["layers", target, "w"] = Place(f"{block}{part}.{target}_proj.weight")
        if config.qkv_bias and target in "qkv":
            names["layers", target, "b"] = Place(f"{block}{part}.{target}_proj.bias")
    if config.family == "phi3":
        names |= _fused(config, block + "self_attn.qkv_proj.weight", block + "mlp.gate_up_proj.weight")
    if config.experts:
        names |= _experts(config, block)
    if not config.tied:
        names["head",] = Place("lm_head.weight")
    return names


def _fused(config: DecoderConfig, qkv: str, gate_up: str) -> dict[Path, Place]:
    names: dict[Path, Place] = {}
    for tensor, targets in ((qkv, "qkv"), (gate_up, ("gate", "up"))):
        start = 0
        for target in targets:
            out = config.target_shape(target)[-1]
            names["layers", target, "w"] = Place(tensor, (start, start + out))
            start += out
    return names


def _experts(config: DecoderConfig, block: str) -> dict[Path, Place]:
    mixtral = config.family == "mixtral"
    part = block + ("block_sparse_moe." if mixtral else "mlp.")
    own = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {t: f"{t}_proj" for t in ("gate", "up", "down")}
    names: dict[Path, Place] = {("layers", "router", "w"): Place(part + "gate.weight")}
    return names | {("layers", t, "w"): Place(f"{part}experts.{{e}}.{name}.weight") for t, name in own.items()}


def gguf_names(config: DecoderConfig) -> dict[Path, Place]:
    """Path of every leaf -> its place in a GGUF file, whose Gemma norms have their one added already."""
    parts = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    parts |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    norms = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
    if config.post_norms:
        norms |= {"attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
    if config.qk_norm:
        norms |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    names: dict[Path, Place] = {("embed",): Place("token_embd.weight"), ("norm",): Place("output_norm.weight")}
    names |= {("layers", ours): Place(f"blk.{{i}}.{theirs}.weight") for ours, theirs in norms.items()}
    for target, part in parts.items():
        names["layers", target, "w"] = Place(f"blk.{{i}}.{part}.weight")
        if config.qkv_bias and target in "qkv":
            names["layers", target, "b"] = Place(f"blk.{{i}}.{part}.bias")
    if not config.tied:
        names["head",] = Place("output.weight")
    return names
