"""What was computed once: finished work under the hash of everything that decides it.

An identity is a JSON value: the section of the config, fingerprints of the data and of the weights, and the hash of the
values the work started from. The same identity gives the same file name in every comparison, so runs that share a
cache folder share their work. Entries appear whole or not at all; a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif.checkpoint import WAYPOINTS, fingerprint, load_arrays, save_arrays
from aif.errors import BadInput
from aif.sharding import host

STAGE = ("trained.safetensors", "metrics.jsonl", "done.json")  # the last one marks a stage as whole


def content_hash(identity: Any) -> str:
    """Hash of a JSON value and of the engine's version; the order of keys does not matter."""
    text = json.dumps({"engine": version("aif"), "identity": identity}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def digest(tree: Any) -> str:
    """Hash of the names, shapes, types and bits of a tree of arrays."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.ascontiguousarray(host(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape};".encode())
        found.update(values.tobytes())
    return found.hexdigest()[:24]


@dataclass(frozen=True)
class Cache:
    """A folder of finished work; without one nothing is kept. `read=False` makes everything again and replaces it."""

    folder: Path | None = None
    read: bool = True
    say: Callable[[str], None] = lambda text: None

    def arrays(self, kind: str, identity: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The nested dict of arrays that `make()` returns, or returned when it was last called; as numpy arrays."""
        return self.packed(kind, identity, lambda: (make(), {}))[0]

    def record(self, kind: str, identity: Any, make: Callable[[], Any]) -> Any:
        """The JSON value that `make()` returns, or what it returned when it was last made."""
        return self.packed(kind, identity, lambda: ({}, make()))[1]

    def packed(
        self, kind: str, identity: Any, make: Callable[[], tuple[dict[str, Any], Any]]
    ) -> tuple[dict[str, Any], Any]:
        """Arrays and a JSON value together: `make()`, or what it returned when it was last made."""
        if self.folder is None:
            return make()
        path = self.folder / kind / f"{content_hash(identity)}.safetensors"
        if self.read and path.exists():
            try:
                tree, about = load_arrays(path, np.asarray)
                if about["fingerprint"] != fingerprint(tree):
                    raise BadInput(f"{path}: its arrays do not match their fingerprint")
                self.say(f"{kind}: read back from {path}")
                return tree, about["value"]
            except BadInput as error:
                self.say(f"{error}; made again")
        tree, value = make()
        tree = jax.tree.map(np.asarray, tree)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, tree, {"fingerprint": fingerprint(tree), "value": value, "identity": identity})
        return tree, value

    def fetch(self, identity: Any, folder: Path) -> bool:
        """Copy the finished stage of this identity into its run folder, if there is one and the folder has none."""
        if self.folder is None or not self.read:
            return False
        found = self.folder / "stages" / content_hash(identity)
        if not (found / STAGE[-1]).exists() or folder.exists():
            return False
        _copy(found, folder)
        self.say(f"{folder.name}: read back from {found}")
        return True

    def publish(self, identity: Any, folder: Path) -> None:
        """Copy a finished stage from its run folder, for others to fetch."""
        if self.folder is None:
            return
        place = self.folder / "stages" / content_hash(identity)
        if not self.read and place.exists():
            shutil.rmtree(place)
        if not (place / STAGE[-1]).exists():
            _copy(folder, place)


def _copy(source: Path, place: Path) -> None:
    """Copy a stage; `place` appears with all of its files, and whoever is first wins."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in STAGE:
        shutil.copyfile(source / name, temporary / name)
    if (source / WAYPOINTS).exists():
        shutil.copytree(source / WAYPOINTS, temporary / WAYPOINTS)
    try:
        temporary.rename(place)
    except OSError:  # it has appeared meanwhile
        shutil.rmtree(temporary)
