"""From a direction file and a dose, as the command line writes them, to edits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from aif.directions.files import load_direction
from aif.errors import BadInput
from aif.steering import add, project_out, together
from aif.steering import clamp as set_to
from aif.types import Direction, Edits

Specs = str | Path | Sequence[str | Path] | None  # one or several; commas separate several in one text


def edits_from(
    lm: Any, *, steer: Specs = None, clamp: Specs = None, ablate: Specs = None, rows: int = 1
) -> Edits | None:
    """Edits, all of them at once, as the command line and configs write them.

    Args:
      steer: `FILE:DOSE[@LAYER]`, added at the file's own layer unless one is named; doses are residual norms.
      clamp: `FILE:VALUE[@LAYER]`, the coordinate along the direction set to so many residual norms.
      ablate: `FILE[@LAYER]`, projected out at every layer unless one is named.

    Raises:
      BadInput: a specification, a file or a layer is not right.
    """
    made = [_dosed(lm, add, spec, "--steer", rows) for spec in _each(steer)]
    made += [_dosed(lm, set_to, spec, "--clamp", rows) for spec in _each(clamp)]
    made += [_ablation(lm, spec, rows) for spec in _each(ablate)]
    return together(*made) if made else None


def _each(specs: Specs) -> list[str]:
    given = [specs] if isinstance(specs, str | Path) else specs or ()
    return [part for spec in given for part in str(spec).split(",")]


def _dosed(lm: Any, edit: Any, spec: str, option: str, rows: int) -> Edits:
    file, dose, layer = parse(spec, option)
    direction = _load(lm, file)
    layers = [_layer(direction, layer, file)]
    return edit(direction.vector, jnp.full(rows, dose), residual_norms(direction, file), layers=layers)


def _ablation(lm: Any, spec: str, rows: int) -> Edits:
    file, at, layer = spec.rpartition("@")
    named = at and layer.lstrip("-").isdigit()
    layers = [int(layer)] if named else range(lm.config.layers)
    return project_out(_load(lm, Path(file if named else spec)).vector, rows=rows, layers=layers)


def _load(lm: Any, file: Path) -> Direction:
    return load_direction(file, fingerprint=lm.fingerprint, shape=(lm.config.layers, lm.config.width))


def parse(spec: str, option: str = "--steer") -> tuple[Path, float, int | None]:
    """`FILE:DOSE[@LAYER]` in its three parts."""
    file, _, rest = spec.rpartition(":")
    dose, at, layer = rest.partition("@")
    try:
        if not file or not math.isfinite(float(dose)):
            raise ValueError
        return Path(file), float(dose), int(layer) if at else None
    except ValueError as error:
        raise BadInput(
            f"{option} {spec}: write FILE:DOSE or FILE:DOSE@LAYER, as in contrast.safetensors:0.5@14"
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
