"""Placement on a mesh: the rules, what is refused, and that eight fake devices compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import aif
from aif.checkpoint import _fingerprint, fingerprint
from aif.config import check
from aif.errors import BadInput
from aif.experiment import check_rows
from aif.objectives.narrow import Beside, narrow
from aif.sharding import AXES, host, make_mesh, place, shared, spec

MESH = AbstractMesh((2, 2, 2), AXES)
SCRIPT = Path(__file__).parent / "sharded.py"
ARMS = {"only": {"objective": {"name": "sft"}, "steps": 1}}

RULES = [
    ("embed", (260, 64), ("tensor", "fsdp")),
    ("embed", (259, 64), (None, "fsdp")),
    ("embed/d", (1, 260, 64), (None, "tensor", "fsdp")),
    ("layers/q/w", (2, 64, 32), (None, "fsdp", "tensor")),
    ("layers/q/w/d", (2, 64, 32), (None, "fsdp", "tensor")),
    ("layers/down/w", (2, 4, 48, 64), (None, None, "tensor", "fsdp")),
    ("layers/q/b", (2, 32), (None, "tensor")),
    ("layers/router/w", (2, 64, 4), ()),
    ("layers/attn_norm", (2, 64), ()),
    ("q/a", (2, 64, 4), (None, "fsdp")),
    ("q/b", (2, 4, 32), (None, None, "tensor")),
    ("gate/b", (2, 4, 4, 128), (None, None, None, "tensor")),
    ("o/b", (2, 4, 64), (None, None, "fsdp")),
    ("1/mu/layers/o/w", (2, 64, 64), (None, "tensor", "fsdp")),
    ("vector/u", (2, 64), ()),
    ("q/scale", (2,), ()),
]


@pytest.mark.parametrize(("path", "shape", "wanted"), RULES)
def test_rules(path, shape, wanted):
    assert spec(path, shape, MESH) == PartitionSpec(*wanted)


def test_an_axis_of_one_device_splits_nothing():
    assert spec("layers/q/w", (2, 64, 32), AbstractMesh((8, 1, 1), AXES)) == PartitionSpec()
    assert spec("layers/q/w", (2, 64, 32), AbstractMesh((1, 8, 1), AXES)) == PartitionSpec(None, "fsdp")


def test_one_device_is_no_mesh_and_changes_nothing():
    tree = {"q": {"a": np.ones(3)}}
    assert make_mesh() is None and place(tree, None) is tree and shared(None) == 1
    assert host(jax.numpy.arange(3)).tolist() == [0, 1, 2]


def test_what_a_mesh_cannot_share_is_refused(tmp_path):
    with pytest.raises(BadInput, match=f"data 64 x fsdp 1 x tensor 1 = 64, and there are {jax.device_count()} devices"):
        make_mesh(data=64)
    with pytest.raises(BadInput, match=r"batch.rows: 6 cannot be shared evenly by mesh.data x mesh.fsdp = 4"):
        check({"arms": ARMS, "batch": {"rows": 6}, "mesh": {"data": 2, "fsdp": 2}})
    with pytest.raises(BadInput, match=r"objective narrow: rows: 3 cannot be shared"):
        check_rows(narrow(beside=Beside(rows=3)), 2)
    wide = {"arms": ARMS, "batch": {"rows": 64}, "mesh": {"data": 64}, "model": {"source": "nowhere"}}
    with pytest.raises(BadInput, match="mesh: "):  # before the model is looked for
        aif.fit(wide)
    check_rows(narrow(), 2)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_the_fingerprint_of_parts_is_that_of_the_whole(shape):
    for x in (np.random.default_rng(0).normal(size=shape).astype(np.float32), np.full(shape, -3, np.int32)):
        assert int(_fingerprint(x)) == fingerprint([x])[0]


@pytest.mark.parametrize("model", ["tiny-random", "tiny-random-moe", "tiny-random@nf4"])
def test_eight_devices_compute_what_one_does(model):
    """Loss, gradient and weights after steps of two micro-batches of packed rows, with an adapter and edits or all
    weights trained; scores of responses; tokens and log-probabilities of samples: to 1e-5."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, SCRIPT, model], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == (4 if model == "tiny-random" else 1)
