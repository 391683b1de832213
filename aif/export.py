"""Solutions for other engines: a whole model as a Hugging Face folder, or a low-rank adapter as a PEFT folder.

Every export is read again from the disk and must give the logits it was written from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from aif.adapter import changed, check, merge
from aif.errors import BadInput
from aif.models.decoder import TARGETS, DecoderConfig
from aif.models.folder import MAX_SHARD, write_folder
from aif.models.hub import LM
from aif.models.names import Place, hf_names
from aif.models.quantised import floats
from aif.models.weights import placed, read_folder
from aif.types import Adapter

TOLERANCE = 1e-4  # largest difference of a logit between what was to be written and what is read again
ROUNDING = 1e-5  # and between the adapter beside the weights and merged into them, as a share of the largest logit
PREFIX = "base_model.model."


def export_merged(
    lm: LM,
    adapter: Adapter | None,
    out: Path,
    *,
    about: dict[str, Any] | None = None,
    max_shard: int | str = MAX_SHARD,
) -> float:
    """Write the model with its adapter merged into the weights; returns the largest difference of a logit between the
    model with its adapter and what is read again.

    Args:
      about: facts for the model card.
      max_shard: bytes of a weight file at most, as a number or as in "5GB"; what is larger is written in shards.

    Raises:
      BadInput: the folder is not empty, the adapter holds a steering vector, or the size is none.
      RuntimeError: what is read again gives other logits than the merged weights, or those than the adapter.
    """
    params, rest = changed(floats(lm.params), adapter or {})
    merged = replace(lm, params=merge(lm.config, params, rest or {}))
    write_folder(out, lm.config, merged.params, lm.tokenizer, max_shard=max_shard)
    written = _logits(merged)
    del merged  # two copies of the weights at a time are enough
    special = {f"{name}_token_id": getattr(lm.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    special = {key: value for key, value in special.items() if value is not None}
    (out / "generation_config.json").write_text(json.dumps(special, indent=1) + "\n")
    (out / "README.md").write_text(_card(lm, "transformers", about or {}))
    config, again = read_folder(out, lambda *leaf: placed(*leaf)[0])
    read, tuned = _logits(replace(lm, config=config, params=again)), _logits(lm, adapter)
    _same(written, read, TOLERANCE, out)
    return _same(tuned, read, ROUNDING * float(jnp.max(jnp.abs(tuned))), out)


def export_peft(lm: LM, adapter: Adapter, out: Path, *, about: dict[str, Any] | None = None) -> float:
    """Write a low-rank adapter that PEFT loads; returns the largest difference of a logit.

    Where a family stores several of our layers as one tensor (Phi-3), their adapters become one of the ranks together,
    whose B is zero off the diagonal blocks.

    Raises:
      BadInput: the folder is not empty, or the adapter holds what PEFT has no place for.
      RuntimeError: the adapter that is read again gives other logits.
    """
    odd = [name for name in adapter if name not in TARGETS or len(lm.config.target_shape(name)) > 2]
    if odd or not adapter:
        raise BadInput(f"{out}: PEFT has no place for an adapter of {', '.join(odd) or 'nothing'}; export it merged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: is not an empty folder; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    tensors, ranks = _peft_tensors(lm.config, adapter)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(_peft_config(lm, ranks), indent=1) + "\n")
    (out / "README.md").write_text(_card(lm, "peft", about or {}))
    return _same(_logits(lm, adapter), _logits(lm, read_peft(out, lm.config)), TOLERANCE, out)


def _places(config: DecoderConfig) -> dict[str, Place]:
    return {target: hf_names(config)["layers", target, "w"] for target in TARGETS}


def _peft_tensors(config: DecoderConfig, adapter: Adapter) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """PEFT's tensors, with the scale inside B (alpha = rank there), and the rank of every module's short name."""
    modules: dict[str, list[str]] = {}
    places = _places(config)
    for target in TARGETS:
        if target in adapter:
            modules.setdefault(places[target].name.removesuffix(".weight"), []).append(target)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module, targets in modules.items():
        parts = [{leaf: np.asarray(x, np.float32) for leaf, x in adapter[t].items()} for t in targets]
        ranks[module.rsplit(".", 1)[-1]] = sum(part["a"].shape[-1] for part in parts)
        rows = max(place.rows[1] if place.rows else 0 for place in places.values() if place.name == f"{module}.weight")
        for i in range(config.layers):
            a = np.concatenate([part["a"][i].T for part in parts])
            b = np.zeros((rows or parts[0]["b"].shape[-1], len(a)), np.float32)
            column = 0
            for target, part in zip(targets, parts, strict=True):
                rank, start = part["a"].shape[-1], (places[target].rows or (0,))[0]
                own = part["scale"][i] * part["b"][i].T
                b[start : start + len(own), column : column + rank] = own
                column += rank
            name = PREFIX + module.format(i=i)
            tensors |= {f"{name}.lora_A.weight": np.ascontiguousarray(a), f"{name}.lora_B.weight": b}
    return tensors, ranks


def _peft_config(lm: LM, ranks: dict[str, int]) -> dict[str, Any]:
    usual = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.source,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def read_peft(folder: Path, config: DecoderConfig) -> Adapter:
    """The adapter of a PEFT folder for this model.

    Raises:
      BadInput: a file is missing or damaged, or holds modules that the model does not have.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from aif.models.weights import read_json

    settings = read_json(folder / "adapter_config.json")
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{folder}/adapter_model.safetensors: cannot be read ({error}); copy the folder again") from None
    adapter: Adapter = {}
    for target, place in _places(config).items():
        module = place.name.removesuffix(".weight")
        names = [PREFIX + module.format(i=i) for i in range(config.layers)]
        found = [name for name in names if f"{name}.lora_A.weight" in tensors]
        if not found:
            continue
        blank = {x: np.zeros_like(tensors[f"{found[0]}.lora_{x}.weight"]) for x in "AB"}
        a, b = (np.stack([tensors.get(f"{n}.lora_{x}.weight", blank[x]) for n in names]) for x in "AB")
        short = module.rsplit(".", 1)[-1]
        rank = settings.get("rank_pattern", {}).get(short, settings.get("r"))
        alpha = settings.get("alpha_pattern", {}).get(short, settings.get("lora_alpha"))
        rows = slice(*place.rows) if place.rows else slice(None)
        scale = jnp.array([alpha / rank if name in found else 0.0 for name in names])
        adapter[target] = {
            "a": jnp.asarray(a.swapaxes(1, 2)),
            "b": jnp.asarray(b[:, rows].swapaxes(1, 2)),
            "scale": scale,
        }
    return check(adapter, config, str(folder))


def _logits(lm: LM, adapter: Adapter | None = None) -> Array:
    """Logits of one random text of 32 tokens."""
    params, rest = changed(lm.params, adapter or {})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, lm.config.vocab, (1, 32)))
    return replace(lm, params=params).logits(tokens, adapter=rest)


def _same(first: Array, second: Array, most: float, out: Path) -> float:
    """Largest difference of a logit.

    Raises:
      RuntimeError: it exceeds `most`, so the export is not the model.
    """
    worst = float(jnp.max(jnp.abs(first - second)))
    if not worst <= most:
        raise RuntimeError(f"{out}: what was written gives other logits (difference {worst:.1e}); do not use it")
    return worst


def _card(lm: LM, library: str, about: dict[str, Any]) -> str:
    """A model card: what it is, how to load it, where it came from."""
    load = {
        "transformers": 'AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        "peft": f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{lm.source}"), "THIS FOLDER")',
    }[library]
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    return (
        f"---\nbase_model: {json.dumps(lm.source)}\nlibrary_name: {library}\ntags: [aif]\n---\n\n"
        f"# {lm.source}, fine-tuned with aif\n\n```python\nmodel = {load}\n```\n\n"
        f"- weights it was trained on: {lm.source} (fingerprint {lm.fingerprint})\n{facts}\n"
    )
