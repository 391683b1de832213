"""Write filters.npz: which tokens transformers' logits warpers keep, for hand-picked and random logits.

    .venv-torch/bin/python tests/golden/make_filters.py

Warpers act in transformers' own order (temperature, top-k, top-p, min-p) on `[rows, 60]` logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

SETTINGS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 0.9, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.7, 0, 0.5, 0.0),
    (1.5, 20, 0.8, 0.0),
    (0.5, 1, 1.0, 0.0),
    (1.3, 10, 0.95, 0.05),
    (1.0, 0, 0.01, 0.0),
]


def main() -> None:
    scores = np.random.default_rng(0).normal(0, 2.5, (6, 60)).astype(np.float32)
    kept = []
    for temperature, top_k, top_p, min_p in SETTINGS:
        left = TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
        left = TopKLogitsWarper(top_k)(None, left) if top_k else left
        left = TopPLogitsWarper(top_p)(None, left) if top_p < 1 else left
        left = MinPLogitsWarper(min_p)(None, left) if min_p else left
        kept.append(torch.isfinite(left).numpy())
    out = Path(__file__).with_name("filters.npz")
    np.savez_compressed(out, scores=scores, settings=np.array(SETTINGS), kept=np.array(kept))
    print(out, np.array(kept).sum(-1).tolist())


if __name__ == "__main__":
    main()
