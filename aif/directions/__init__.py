"""Directions of the residual stream: extraction, what they read and move, files, and use as adapters."""

from __future__ import annotations

from aif.directions.activations import Activations, response_means
from aif.directions.contrast import as_adapter, mean_difference, paired_pca, random_direction
from aif.directions.files import load_direction, save_direction
from aif.directions.learned import mean_shift, trained_vector, written
from aif.directions.readable import Readable, probe

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
