"""Checkpoints through Orbax, the run folder and its lock.

A checkpoint holds the training state (trainable values, moments, step, key) and a JSON record with the position in the
data, the stage's settings and fingerprints. Tensor files carry no checksum of their own, so a fingerprint of the bits
is stored with them and compared on restore; a damaged step is passed over, loudly, in favour of the one before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aif.errors import BadInput
from aif.processes import alone
from aif.sharding import host, spread
from aif.types import State

WAYPOINTS = "waypoints"  # the folder of a stage that they lie in


def fingerprint(tree: Any) -> list[int]:
    """Per leaf, the wrap-around uint32 sum of its bits weighted by position: any flipped bit changes it."""
    out = []
    for leaf in jax.tree.leaves(tree):
        if spread(leaf):
            out.append(int(_fingerprint(leaf)))
            continue
        bits = np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)
        words = np.frombuffer(bits.tobytes() + b"\0" * (-bits.size % 4), np.uint32)
        weights = np.arange(1, words.size + 1, dtype=np.uint32) * np.uint32(2654435761) | np.uint32(1)
        out.append(int((words * weights).sum(dtype=np.uint32)))
    return out


@jax.jit
def _fingerprint(x: Array) -> Array:
    """`fingerprint` of an array whose parts lie on several devices, of 4 bytes a number: sums of integers wrap around
    alike in any order."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    steps = [math.prod(x.shape[axis + 1 :]) % (1 << 32) for axis in range(x.ndim)]
    place = sum(
        (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(step) for axis, step in enumerate(steps)),
        jnp.zeros(x.shape, jnp.uint32),
    )
    weights = (place + np.uint32(1)) * np.uint32(2654435761) | np.uint32(1)
    return jnp.sum(words * weights, dtype=jnp.uint32)


class Checkpoints:
    """The checkpoints of one stage in one folder."""

    def __init__(self, folder: Path, *, every: int, keep: int):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as managers
        from orbax.checkpoint import options

        self.ocp = ocp
        self.every = every
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.LatestN(keep),
                cleanup_tmp_directories=True,
                atomicity_options=options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE),
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def save(self, state: State, record: dict[str, Any]) -> None:
        """Save in the background; a failed earlier save is raised here.

        Raises:
          BadInput: the folder cannot be written (full or read-only).
        """
        plain = _without_key(state)
        record = {**record, "fingerprint": fingerprint(plain)}
        record["digest"] = _digest(record)
        args = self.ocp.args
        try:
            self.manager.wait_until_finished()
            self.manager.save(
                int(state.step),
                args=args.Composite(state=args.StandardSave(plain), record=args.JsonSave(record)),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{self.manager.directory}: checkpoint not saved: {_line(error)}; free space or pick another folder"
            ) from error

    def restore(
        self, like: State, warn: Callable[[str], None], agree: Callable[[dict[str, Any]], None] = lambda record: None
    ) -> tuple[State, dict[str, Any]] | None:
        """The newest undamaged checkpoint, or None when there is none at all; damaged newer ones are deleted.

        Args:
          agree: called with the record before any array is read; raises BadInput for a checkpoint of something else.

        Raises:
          BadInput: checkpoints exist and every one of them is damaged, or `agree` says so.
        """
        args = self.ocp.args
        steps = sorted(self.manager.all_steps(), reverse=True)
        plain = _without_key(like)
        abstract = jax.tree.map(self.ocp.utils.to_shape_dtype_struct, plain)
        for number, step in enumerate(steps):
            try:
                read: Any = self.manager.restore(step, args=args.Composite(record=args.JsonRestore()))
                record = read.record
                if record.pop("digest") != _digest(record):
                    raise ValueError("its record does not match its digest")
                agree(record)
                read = self.manager.restore(step, args=args.Composite(state=args.StandardRestore(abstract)))
                state = read.state
                if fingerprint(state) != record["fingerprint"]:
                    raise ValueError("the stored values do not match their fingerprint")
            except BadInput:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                warn(f"{self.manager.directory}/{step}: damaged checkpoint ({_line(error)}); trying the one before")
                continue
            for damaged in steps[:number]:
                self.manager.delete(damaged)
            if not spread(plain["step"]):  # bound to no device, as at the start
                state = jax.tree.map(lambda x: jnp.array(np.asarray(x)), state)
            return _with_key(state), record
        if steps:
            raise BadInput(f"{self.manager.directory}: every checkpoint is damaged; start over with --overwrite")
        return None

    def close(self) -> None:
        """Wait for the last save and let go of the folder."""
        self.manager.wait_until_finished()
        self.manager.close()


@dataclass
class Waypoints:
    """What was trained after some steps of a stage: in its folder, so that a run that goes on has the earlier ones too,
    or in memory for a stage without a folder."""

    folder: Path | None
    held: dict[int, Any] = field(default_factory=dict)

    def keep(self, step: int, trainable: Any) -> None:
        """Keep the values as they are after this step."""
        whole = jax.tree.map(host, trainable)
        if self.folder is None:
            self.held[step] = whole
            return
        place = self.folder / WAYPOINTS
        place.mkdir(parents=True, exist_ok=True)
        alone(partial(save_arrays, place / f"{step}.safetensors", whole, {"step": step}))

    def read(self) -> dict[int, Any]:
        """Every one of them, by step."""
        if self.folder is None:
            return self.held
        found = (self.folder / WAYPOINTS).glob("*.safetensors")
        return {int(path.stem): load_arrays(path)[0] for path in sorted(found, key=lambda path: int(path.stem))}


def _without_key(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}


def _with_key(tree: dict[str, Any]) -> State:
    return State(**{**tree, "key": jax.random.wrap_key_data(tree["key"])})


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def save_arrays(path: Path, tree: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Nested dict of arrays -> one safetensors file with metadata, whole or not at all."""
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {"/".join(k.key for k in keys): np.asarray(x, order="C") for keys, x in leaves}  # a view saves wrongly
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(flat, temporary, metadata={"aif": json.dumps(metadata)})
    os.replace(temporary, path)


def load_arrays(path: Path, as_array: Callable[[Any], Any] = jnp.asarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `save_arrays`; numpy arrays become what `as_array` makes of them.

    Raises:
      BadInput: missing or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("aif", "{}"))
            flat: dict[str, Array] = {name: as_array(file.get_tensor(name)) for name in file.keys()}
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({_line(error)}); make it again") from error
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree, metadata


@contextmanager
def run_folder(folder: Path, *, resume: bool, overwrite: bool):
    """Hold a run folder: refuse one that is not empty unless told how to treat it, and keep other runs out.

    Raises:
      BadInput: not empty, not ours to overwrite, unwritable, or in use by a live process.
    """
    lock = alone(lambda: _hold(folder, resume=resume, overwrite=overwrite))
    try:
        yield folder
    finally:
        if lock is not None:
            lock.unlink(missing_ok=True)


def _hold(folder: Path, *, resume: bool, overwrite: bool) -> Path:
    """The lock of a run folder that is now ours."""
    marker = folder / "run.json"
    if resume and overwrite:
        raise BadInput("--resume and --overwrite: one continues the run, the other deletes it; give one of them")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; name a folder")
    held = [p.name for p in folder.iterdir() if p.name not in ("run.json", "lock")] if folder.exists() else []
    if held and not (resume or overwrite):
        raise BadInput(
            f"{folder}: is not empty; pass --resume to continue it, --overwrite to start over, or another --out"
        )
    if held and not marker.exists():
        raise BadInput(f"{folder}: holds files that are not a run of ours; choose another folder with --out")
    _refuse_live_owner(folder / "lock")
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"engine": "aif", "format": 1}))
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror}); choose another folder with --out") from error
    return _take(folder / "lock")


def _refuse_live_owner(lock: Path) -> None:
    """A lock of a live process on this machine, or of another machine, is respected; a dead process's is removed."""
    try:
        owner = json.loads(lock.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:
        lock.unlink(missing_ok=True)
        return
    here = owner.get("host") == socket.gethostname()
    if here and not alive(owner["pid"], owner.get("started")):
        lock.unlink(missing_ok=True)
        return
    raise BadInput(
        f"{lock.parent}: in use by process {owner.get('pid')} on {owner.get('host')}; "
        "wait for it, or delete the file `lock` there if it is gone"
    )


def alive(pid: int, started: str | None) -> bool:
    """Whether the process that took the lock still runs; its start time tells it from a later one with its number."""
    return os.path.exists(f"/proc/{pid}") and _started(pid) == started if os.path.exists("/proc") else _signal(pid)


def _signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _take(lock: Path) -> Path:
    try:
        with lock.open("x") as file:
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}, file)
    except FileExistsError as error:
        raise BadInput(
            f"{lock.parent}: another process has just taken this folder; choose another with --out"
        ) from error
    return lock
