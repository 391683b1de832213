"""What decides the result of a stage, as JSON: a checkpoint of other settings, weights or data is not continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aif.batches import Dataset
from aif.errors import BadInput
from aif.objectives import Objective
from aif.rollouts import Prompts

if TYPE_CHECKING:
    from aif.train import Settings

DATA = ("data", "corpus")  # what of a stage's meaning the user may change and go on


def meaning(
    objective: Objective, data: Dataset | Prompts, settings: Settings, identity: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that decides what a stage ends with, as JSON: what its folder must agree with, and its hash."""
    meant = {**settings.semantic, **(identity or {}), "objective": objective.name}
    return meant | {"length": data.length if isinstance(data, Dataset) else None, "data": data.fingerprint}


def agree(found: dict[str, Any], meant: dict[str, Any], folder: Path, new_data: bool) -> None:
    """Refuse to continue a checkpoint of other settings, weights or, unless they are accepted, data."""
    different = [k for k in meant if found.get(k) != _plain(meant[k]) and not (new_data and k in DATA)]
    if different:
        k = different[0]
        mend = "restore it, continue with --accept-new-data" if k in DATA else "restore the setting"
        raise BadInput(
            f"{folder}: its checkpoint was made with another {k} ({found.get(k)} there, {meant[k]} here); "
            f"{mend}, or start over with --overwrite"
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
