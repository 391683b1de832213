"""From a direction file and a dose, as the command line writes them, to edits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from aif.directions.files import load_direction
from aif.errors import BadInput
from aif.steering import add, project_out
from aif.types import Direction, Edits


def edits_from(lm: Any, *, steer: str | None, ablate: Path | None, rows: int = 1) -> Edits | None:
    """Edits for `FILE:DOSE[@LAYER]` (added at the file's own layer unless one is named) or for an ablation.

    Raises:
      BadInput: the specification, the file or the layer is not right; both are given.
    """
    shape = (lm.config.layers, lm.config.width)
    if steer and ablate:
        raise BadInput("--steer and --ablate: give one of them")
    if ablate is not None:
        direction = load_direction(ablate, fingerprint=lm.fingerprint, shape=shape)
        return project_out(direction.vector, rows=rows, layers=range(lm.config.layers))
    if not steer:
        return None
    file, dose, layer = parse(steer)
    direction = load_direction(file, fingerprint=lm.fingerprint, shape=shape)
    return add(
        direction.vector, jnp.full(rows, dose), residual_norms(direction, file), layers=[_layer(direction, layer, file)]
    )


def parse(spec: str) -> tuple[Path, float, int | None]:
    """`FILE:DOSE[@LAYER]` in its three parts."""
    file, _, rest = spec.rpartition(":")
    dose, at, layer = rest.partition("@")
    try:
        if not file or not math.isfinite(float(dose)):
            raise ValueError
        return Path(file), float(dose), int(layer) if at else None
    except ValueError as error:
        raise BadInput(
            f"--steer {spec}: write FILE:DOSE or FILE:DOSE@LAYER, as in contrast.safetensors:0.5@14"
        ) from error


def residual_norms(direction: Direction, file: Path) -> Any:
    """Mean residual norm per layer, recorded when the direction was extracted."""
    norms = direction.provenance.get("norms")
    if norms is None:
        raise BadInput(f"{file}: records no residual norms, so a dose has no unit; extract the direction again")
    return jnp.asarray(norms, jnp.float32)


def _layer(direction: Direction, layer: int | None, file: Path) -> int:
    layer = direction.provenance.get("layer") if layer is None else layer
    if layer is None:
        raise BadInput(f"{file}: names no layer; add one, as in {file.name}:0.5@14")
    return layer
