"""Several processes that are one run: how they find one another, and what one of them does for all.

Every process runs the same program on the same batches; its devices are part of one mesh. Files are written by the
first process alone, into a folder that all of them see.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from aif.errors import BadInput

LONGEST = 1000  # bytes of an error that the first process tells the others
HERE = re.compile(r"(\d+)/(\d+)@(\S+:\d+)")


def join(where: str) -> None:
    """Join the other processes of a run, before any device is used.

    Args:
      where: "auto" on a cluster that jax knows (Slurm, Cloud TPU, GKE, Kubernetes, Open MPI), or
        `RANK/COUNT@HOST:PORT`, where HOST is the machine of rank 0.

    Raises:
      BadInput: `where` is neither, or there is no such cluster here.
    """
    import jax

    found = HERE.fullmatch(where)
    if where != "auto" and (found is None or int(found[1]) >= int(found[2])):
        raise BadInput(f"--processes: {where!r} is neither auto nor RANK/COUNT@HOST:PORT, as in 0/2@localhost:1234")
    try:
        if found is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(found[3], int(found[2]), int(found[1]))
    except (ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:160]
        raise BadInput(
            f"--processes {where}: {what}; start all processes, or name them as RANK/COUNT@HOST:PORT"
        ) from error


def several() -> bool:
    """Whether this process is one of several that are one run."""
    import jax

    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes files; the only one has no others to ask."""
    import jax

    return jax.process_index() == 0


def alone(action: Callable[[], Any]) -> Any:
    """Let the first process do something while the others wait; returns what it returned there, and None elsewhere.

    Raises:
      BadInput: in all processes, where the first one raises it.
    """
    if not several():
        return action()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    result, trouble = None, b""
    if first():
        try:
            result = action()
        except BadInput as error:
            trouble = str(error).encode()[:LONGEST]
    told = broadcast_one_to_all(np.frombuffer(trouble.ljust(LONGEST, b"\0"), np.uint8))
    said = bytes(np.asarray(told)).rstrip(b"\0").decode(errors="replace")
    if said:
        raise BadInput(said)
    return result
