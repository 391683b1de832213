"""Directions of the residual stream: extraction, what they read and move, files, and use as adapters.

Names are imported on first use: an extraction needs no probe, and what tests a probe takes longer to import than it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Activations": "activations",
    "Readable": "readable",
    "as_adapter": "contrast",
    "load_direction": "files",
    "mean_difference": "contrast",
    "mean_shift": "learned",
    "paired_pca": "contrast",
    "probe": "readable",
    "random_direction": "contrast",
    "response_means": "activations",
    "save_direction": "files",
    "trained_vector": "learned",
    "written": "learned",
}

if TYPE_CHECKING:
    from aif.directions.activations import Activations, response_means
    from aif.directions.contrast import as_adapter, mean_difference, paired_pca, random_direction
    from aif.directions.files import load_direction, save_direction
    from aif.directions.learned import mean_shift, trained_vector, written
    from aif.directions.readable import Readable, probe


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'aif.directions' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"aif.directions.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "Activations",
    "Readable",
    "as_adapter",
    "load_direction",
    "mean_difference",
    "mean_shift",
    "paired_pca",
    "probe",
    "random_direction",
    "response_means",
    "save_direction",
    "trained_vector",
    "written",
]
