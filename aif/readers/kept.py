"""Judgements on disk: one JSON file per question, so that none is asked, or paid for, twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.errors import BadInput


@dataclass(frozen=True)
class Kept:
    """A folder of judgements over `levels` levels; with no folder nothing is kept.

    An entry holds `probabilities` (one per level, summing to one) and whatever else its writer notes.
    """

    folder: Path | None
    levels: int

    def get(self, key: tuple[str, ...]) -> dict[str, Any] | None:
        """The entry of a key; None where there is none, or where the file is torn or not an entry."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(self.folder, key).read_bytes())
            probabilities = [float(p) for p in entry["probabilities"]]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        whole = len(probabilities) == self.levels and min(probabilities) >= 0
        return entry if whole and math.isclose(sum(probabilities), 1.0, abs_tol=1e-3) else None

    def put(self, key: tuple[str, ...], entry: dict[str, Any]) -> None:
        """Write an entry, whole or not at all.

        Raises:
          BadInput: the folder cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(self.folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                file.write(json.dumps(entry))
            os.replace(file.name, path)
        except OSError as error:
            raise BadInput(
                f"{self.folder}: cannot be written ({error.strerror}); free some space or set judge.cache elsewhere"
            ) from None

    @staticmethod
    def _path(folder: Path, key: tuple[str, ...]) -> Path:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return folder / name[:2] / f"{name}.json"


__all__ = ["Kept"]
