"""Whether this machine is fit for a run. A check returns what it found, or raises `BadInput` with the remedy."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from aif.checkpoint import alive
from aif.errors import BadInput
from aif.models.catalogue import CATALOGUE, cache_folder

ROOM = 5e9  # bytes that a model and a small run take


def python() -> str:
    """A Python that the engine runs on."""
    if sys.maxsize < 1 << 32:
        raise BadInput(f"{sys.executable} is a 32-bit Python; install a 64-bit one of 3.11 or newer")
    return platform.python_version()


def packages() -> str:
    """The versions of jax that belong together."""
    jax, jaxlib = version("jax"), version("jaxlib")
    if jax != jaxlib:
        raise BadInput(f"jax {jax} and jaxlib {jaxlib} differ; `pip install -U jax[cuda]`, jax[tpu] or jax")
    return f"jax {jax}, flax {version('flax')}, orbax-checkpoint {version('orbax-checkpoint')}"


def devices() -> str:
    """Devices that compute what they should."""
    import jax
    import jax.numpy as jnp

    try:
        found = jax.devices()
        total = float(jnp.sum(jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))))
    except RuntimeError as error:
        raise BadInput(f"{' '.join(str(error).split())[:160]}; check the driver, or set JAX_PLATFORMS=cpu") from error
    if total != 512:
        raise BadInput(f"a product of ones sums to {total}, not 512; check the driver")
    return f"{len(found)} x {found[0].platform} {found[0].device_kind}, a product is right"


def cache() -> str:
    """A cache folder that can be written."""
    return writable(cache_folder())


def compilation() -> str:
    """Where compiled programs are kept."""
    import jax

    from aif.runtime import compilation_cache

    compilation_cache()
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return "off, by AIF_COMPILATION_CACHE" if folder is None else writable(Path(folder))


def here() -> str:
    """A working folder that can be written: runs lie in `runs/` there."""
    return writable(Path.cwd())


def room() -> str:
    """Space on the disks of the cache and of the runs."""
    free = {place: shutil.disk_usage(existing(place)).free for place in (cache_folder(), Path.cwd())}
    place, least = min(free.items(), key=lambda item: item[1])
    if least < ROOM:
        raise BadInput(f"{least / 1e9:.1f} GB free at {place}; free {ROOM / 1e9:.0f} GB, or set AIF_CACHE")
    return f"{least / 1e9:.0f} GB free"


def models() -> str:
    """Models of the catalogue that are in the cache, whole."""
    found = {name: cache_folder() / record.file for name, record in CATALOGUE.items()}
    empty = [path for path in found.values() if path.exists() and not path.stat().st_size]
    if empty:
        raise BadInput(f"{empty[0]} is empty; fetch it again with `aif models fetch NAME --force`")
    return ", ".join(name for name, path in found.items() if path.exists()) or "none fetched yet"


def locks() -> str:
    """Runs here whose process is gone and left its lock; a new run takes them over."""
    held, left = [], []
    for lock in sorted(Path.cwd().glob("runs/*/lock")):
        try:
            owner = json.loads(lock.read_text())
            mine = owner["host"] == socket.gethostname()
            (held if not mine or alive(owner["pid"], owner.get("started")) else left).append(lock.parent.name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{lock} cannot be read; delete it if no run is using the folder") from error
    return f"{len(held)} runs going on, {len(left)} left behind"


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def writable(folder: Path) -> str:
    """The folder, after a file has been written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); set AIF_CACHE, or work elsewhere") from error
    return str(folder)


CHECKS: dict[str, Callable[[], str]] = {
    "python": python,
    "packages": packages,
    "devices": devices,
    "cache folder": cache,
    "compilation cache": compilation,
    "working folder": here,
    "disk space": room,
    "models": models,
    "locks": locks,
}
