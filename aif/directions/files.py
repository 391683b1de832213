"""Direction files: safetensors for the vectors, a JSON sidecar for what they mean."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp

from aif.checkpoint import load_arrays, save_arrays
from aif.directions.record import SITE
from aif.errors import BadInput
from aif.types import Direction


def save_direction(direction: Direction, path: Path) -> None:
    """Write `path` (.safetensors) and its sidecar `path` with .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"kind": direction.kind, **direction.provenance}
    save_arrays(path, {"direction": direction.vector}, about)
    path.with_suffix(".json").write_text(json.dumps(about, indent=1))


def load_direction(path: Path, *, fingerprint: str | None = None, shape: tuple[int, int] | None = None) -> Direction:
    """Read a direction, refusing one made on another model or for another site.

    Raises:
      BadInput: unreadable, not finite, of another shape, for another site than the block's output, or extracted from
        other weights than `fingerprint`.
    """
    tree, about = load_arrays(path)
    if "direction" not in tree:
        raise BadInput(f"{path}: holds no direction; name a file written by `aif direction extract`")
    vector = tree["direction"]
    site = about.get("site", SITE)
    if site != SITE:
        raise BadInput(f"{path}: acts on {site!r}, and here directions act on the {SITE}; extract it from there")
    if not bool(jnp.isfinite(vector).all()):
        raise BadInput(f"{path}: a value of the direction is not finite; extract it again")
    if shape is not None and vector.shape != shape:
        raise BadInput(
            f"{path}: a direction of shape {vector.shape} for a model of {shape}; extract one from this model"
        )
    made_on = about.get("weights")
    if fingerprint is not None and made_on not in (None, fingerprint):
        raise BadInput(
            f"{path}: extracted from other weights ({made_on}) than this model's ({fingerprint}), "
            f"those of {about.get('model', 'a model without a name')}; extract it again"
        )
    return Direction(jnp.asarray(vector), about.pop("kind", "unknown"), about)
