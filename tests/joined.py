"""Run by test_processes as two processes: one run of both, cut off after its first checkpoint and resumed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import aif
from aif.processes import alone, join

CONFIG = {
    "model": {"source": "tiny-random", "remat": "none"},
    "corpus": {"path": "bundled:tiny"},
    "batch": {"rows": 2, "length": 384},
    "adapter": {"rank": 2, "alpha": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup": 1},
    "arms": {"only": {"objective": {"name": "dpo", "beta": 0.1}, "steps": 4}},
    "checkpoint": {"every": 2},
    "log": {"tensorboard": False},
}


def cut_off(folder: Path) -> None:
    """What a run leaves that was killed after step 2."""
    stage = folder / "stages" / "seed-0" / "only"
    for name in ("done.json", "trained.safetensors"):
        (stage / name).unlink()
    shutil.rmtree(stage / "checkpoints" / "4")


def main(where: str, folder: Path) -> None:
    join(where)
    config = {**CONFIG, "mesh": {"data": 2}}
    whole = aif.fit(config, out=folder).provenance["log"]
    alone(lambda: cut_off(folder))
    resumed = aif.fit(config, out=folder, resume=True, quiet=False).provenance["log"]
    for x in (*whole, *resumed):
        del x["seconds"]
    assert whole == resumed
    print("same")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
