"""Several processes that are one run: same numbers, one writer, resumed together and then by one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from joined import CONFIG, cut_off

import aif
from aif.errors import BadInput
from aif.processes import alone, first, join, several

SCRIPT = Path(__file__).parent / "joined.py"
LINES = Path("stages") / "seed-0" / "only" / "metrics.jsonl"


@pytest.mark.parametrize("where", ["", "slurm", "2/2@here:1", "0/2", "0/2@here", "a/b@here:1"])
def test_a_place_that_is_none(where):
    with pytest.raises(BadInput, match="neither auto nor RANK/COUNT@HOST:PORT"):
        join(where)


def test_one_process_waits_for_nobody():
    assert first() and not several() and alone(lambda: 3) == 3
    with pytest.raises(BadInput, match="as it is"):
        alone(lambda: (_ for _ in ()).throw(BadInput("as it is")))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / LINES).read_text().splitlines()]


def test_two_processes_train_as_one_and_either_resumes_the_other(tmp_path):
    """Losses of a run of two processes (Gloo) are those of one; cut off, both resume it to the same numbers; cut off
    once more, one process restores what two saved and ends where they did."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    folder, environment = tmp_path / "two", {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    started = [
        subprocess.Popen([sys.executable, SCRIPT, f"{rank}/2@localhost:{port}", folder], **pipes) for rank in (0, 1)
    ]
    said = [p.communicate(timeout=900)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], said
    assert "continuing at step 2\n" in said[0] and "continuing" not in said[1]  # one of them speaks
    alone_log = aif.fit(CONFIG).provenance["log"]
    np.testing.assert_allclose(losses(folder), [line["loss"] for line in alone_log], rtol=1e-6)
    cut_off(folder)
    together = losses(folder)
    aif.fit(CONFIG, out=folder, resume=True)
    np.testing.assert_allclose(losses(folder), together, rtol=1e-6)
