"""Directions for other engines: llama.cpp control vectors, and ablations written into weights.

A control vector adds: `direction.N` is added to the output of the 0-based block N, and there is no N = 0, so block 0
cannot be steered and a direction that is meant to be projected out is refused; an ablation goes into the weights. Every
matrix that writes to the residual stream loses the direction,

    W <- W (I - vhat vhat^T)    for the embedding, every o_proj and every down_proj,

with one vhat at every layer. The vocabulary head only reads, so a tied one is written apart, unchanged.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aif.directions.record import SITE, check_layer, units
from aif.errors import BadInput
from aif.models.decoder import DecoderConfig, head
from aif.types import Direction, Params

ARCHITECTURE = "controlvector"


def control_vector(
    direction: Direction,
    path: Path,
    *,
    config: DecoderConfig,
    layers: Sequence[int] | None = None,
    dose: float | None = None,
) -> list[int]:
    """Write a GGUF control vector; returns the layers in it.

    Args:
      layers: the direction's own layer when left out.
      dose: residual norms per layer; the raw vector when left out. llama.cpp multiplies it by its own scale.

    Raises:
      BadInput: the direction is not additive, a layer is 0 or does not exist, or a dose has no unit.
    """
    about, L = direction.provenance, direction.vector.shape[0]
    operation = about.get("operation", "add")
    if operation != "add":
        raise BadInput(
            f"export: the direction is to {operation}, and llama.cpp would add it; export the ablation as weights"
        )
    chosen = [l for l in (about.get("layer"),) if l is not None] if layers is None else list(layers)
    if not chosen:
        raise BadInput("export: the direction names no layer; give one")
    for layer in chosen:
        if check_layer(layer, L, "export") == 0:
            raise BadInput(
                "export: a control vector has no place for block 0 (direction.N is block N's output, N >= 1); choose a "
                "later layer"
            )
    vector = np.asarray(direction.vector, np.float32)
    if dose is not None:
        if about.get("norms") is None:
            raise BadInput("export: the direction records no residual norms, so a dose has no unit; extract it again")
        vector = units(vector) * dose * np.asarray(about["norms"], np.float32)[:, None]
    _write_gguf(path, {f"direction.{layer}": vector[layer] for layer in chosen}, config.family, direction, dose)
    return chosen


def _write_gguf(
    path: Path, tensors: dict[str, np.ndarray], family: str, direction: Direction, dose: float | None
) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", family)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(tensors))
    for name in ("model", "weights"):
        if direction.provenance.get(name):
            writer.add_string(f"aif.{name}", str(direction.provenance[name]))
    writer.add_string("aif.kind", direction.kind)
    writer.add_string("aif.norm_unit", "raw" if dose is None else f"{dose:g} residual norms")
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_control_vector(path: Path, config: DecoderConfig) -> Direction:
    """A GGUF control vector as a direction; layers that the file leaves out are zero.

    Raises:
      BadInput: no GGUF file, not a control vector, one of another family, width or depth, or not finite.
    """
    from aif.models.gguf import read_header

    header = read_header(path)
    kind = header.fields.get("general.architecture")
    if kind != ARCHITECTURE:
        raise BadInput(f"{path}: holds a {str(kind)[:40]!r} model, not a control vector; give a control vector's file")
    hint = str(header.fields.get(f"{ARCHITECTURE}.model_hint", ""))[:40]
    if hint != config.family:
        raise BadInput(f"{path}: made for a {hint or 'nameless'!r} model, not for {config.family}; make it on this one")
    vector, found = np.zeros((config.layers, config.width), np.float32), []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, tensor in header.tensors.items():
            layer = _layer_of(name, path, config)
            if tensor.shape != (config.width,) or tensor.kind.name != "F32":
                raise BadInput(
                    f"{path}: {name} is {list(tensor.shape)} {tensor.kind.name}, and this model's residual has "
                    f"{config.width} values in F32; make it on this model"
                )
            vector[layer] = np.frombuffer(data[tensor.start : tensor.start + tensor.size], "<f4")
            found.append(layer)
    if not found or not np.isfinite(vector).all():
        raise BadInput(f"{path}: {'a value is not finite' if found else 'holds no direction.N'}; make it again")
    own = {name: header.fields[f"aif.{name}"] for name in ("model", "weights") if f"aif.{name}" in header.fields}
    longest = int(np.linalg.norm(vector, axis=1).argmax())
    about = {
        **own,
        "site": SITE,
        "layer": longest,
        "layers": sorted(found),
        "operation": "add",
        "token_scope": "all",
        "method": "GGUF control vector",
        "sign": "as in the file",
        "norm_unit": str(header.fields.get("aif.norm_unit", "raw")),
    }
    return Direction(jnp.asarray(vector), str(header.fields.get("aif.kind", "imported")), about)


def _layer_of(name: str, path: Path, config: DecoderConfig) -> int:
    word, _, number = name.partition(".")
    if word != "direction" or not number.isascii() or not number.isdigit():
        raise BadInput(f"{path}: holds {name[:80]!r}, which no control vector has; give a control vector's file")
    if not 1 <= int(number) < config.layers:
        raise BadInput(
            f"{path}: {name[:80]} is out of range; the model's blocks that can be steered are 1..{config.layers - 1}"
        )
    return int(number)


def ablated(config: DecoderConfig, params: Params, vector: Float[np.ndarray, "D"]) -> tuple[DecoderConfig, Params]:
    """The model without the direction: nothing it computes ever writes along it. A tied head becomes one of its own.

    Raises:
      BadInput: the model norms what its blocks write before it is added, or the direction is zero.
    """
    from dataclasses import replace

    if config.post_norms:
        raise BadInput(
            f"export: {config.family} norms what o_proj and down_proj write, which turns it; project it out instead"
        )
    if vector.shape != (config.width,) or not np.any(vector) or not np.isfinite(vector).all():
        raise BadInput(
            f"export: the direction must be {config.width} finite values, not all zero; choose another layer"
        )
    (unit,) = jnp.asarray(units(np.asarray(vector, np.float64)[None]), jnp.float32)
    without = lambda w: w - (w @ unit)[..., None] * unit  # noqa: E731
    layers = dict(params["layers"])
    for target in ("o", "down"):
        layers[target] = {leaf: without(value) for leaf, value in layers[target].items()}
    changed = {**params, "embed": without(params["embed"]), "layers": layers, "head": head(params)}
    return replace(config, tied=False), changed
