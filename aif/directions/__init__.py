"""Directions of the residual stream: extraction, files, and use as adapters."""

from __future__ import annotations

from aif.directions.activations import Activations, response_means
from aif.directions.contrast import as_adapter, mean_difference, random_direction
from aif.directions.files import load_direction, save_direction

__all__ = [
    "Activations",
    "as_adapter",
    "load_direction",
    "mean_difference",
    "random_direction",
    "response_means",
    "save_direction",
]
