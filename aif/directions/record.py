"""What a direction's file must say of it: where it came from, where it acts, and in which unit.

model, weights      the model and the fingerprint of its weights
site                where it was read and acts: the residual stream at a block's output
layer               the layer that it is meant for; the vectors of all layers are kept
method, sign        how it was made, and which way it points
tokens_pooled       which tokens it was read from, `tokens` of them
data                fingerprint of the texts
norm_unit, norms    the unit of its length; mean residual norm per layer, the unit of doses
operation           what it is for: add, project or clamp
token_scope         the tokens that the operation acts on
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aif.directions.activations import Activations
from aif.errors import BadInput
from aif.slots import Pool

SITE = "residual after the block"
OPERATIONS = ("add", "project", "clamp")
POOLED = {"mean": "all tokens of the response", "last": "last token of the response"}


def origin(lm: Any) -> dict[str, Any]:
    """The model a direction belongs to."""
    return {"model": lm.source, "weights": lm.fingerprint, "site": SITE}


def read_from(activations: Activations, data: str, pool: Pool = "mean") -> dict[str, Any]:
    """The texts a direction was read from, and the norms that make doses mean something."""
    return {
        "tokens_pooled": POOLED[pool],
        "tokens": int(activations.tokens.sum()) if pool == "mean" else len(activations.tokens),
        "data": data,
        "norms": activations.norms.tolist(),
    }


def purpose(layer: int | None, *, operation: str = "add", token_scope: str = "all") -> dict[str, Any]:
    """What a direction is for; without a layer, its maker names the one where it is longest or reads best.

    Raises:
      BadInput: there is no such operation.
    """
    if operation not in OPERATIONS:
        raise BadInput(f"direction: operation {operation!r} is not known; use {', '.join(OPERATIONS)}")
    at = {} if layer is None else {"layer": layer}
    return {**at, "operation": operation, "token_scope": token_scope}


def check_layer(layer: int, layers: int, where: str = "direction") -> int:
    """The layer, if the model has it.

    Raises:
      BadInput: it does not.
    """
    if not 0 <= layer < layers:
        raise BadInput(f"{where}: layer {layer} is out of range; the model has layers 0..{layers - 1}")
    return layer


def units(vector: np.ndarray) -> np.ndarray:
    """Rows of unit length; a zero row stays zero."""
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return vector / np.where(length > 0, length, 1.0)
