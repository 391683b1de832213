"""Directions of the residual stream: extraction, what they read and move, files, and use as adapters.

Names are imported on first use: an extraction needs no probe, and what tests a probe takes longer to import than it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aif.lazily import lazily

_WHERE = {
    "Activations": "aif.directions.activations",
    "Readable": "aif.directions.readable",
    "as_adapter": "aif.directions.contrast",
    "load_direction": "aif.directions.files",
    "mean_difference": "aif.directions.contrast",
    "mean_shift": "aif.directions.learned",
    "paired_pca": "aif.directions.contrast",
    "probe": "aif.directions.readable",
    "random_direction": "aif.directions.contrast",
    "response_means": "aif.directions.activations",
    "save_direction": "aif.directions.files",
    "trained_vector": "aif.directions.learned",
    "written": "aif.directions.learned",
}

if TYPE_CHECKING:
    from aif.directions.activations import Activations, response_means
    from aif.directions.contrast import as_adapter, mean_difference, paired_pca, random_direction
    from aif.directions.files import load_direction, save_direction
    from aif.directions.learned import mean_shift, trained_vector, written
    from aif.directions.readable import Readable, probe


__getattr__ = lazily(__name__, _WHERE)

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
