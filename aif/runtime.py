"""The process a run lives in: compilation cache, environment record, and being asked to stop."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from aif.processes import several

PACKAGES = ("aif", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy", "scipy")


def compilation_cache() -> None:
    """Keep compiled programs on disk between runs, unless the user has set a cache of their own.

    `AIF_COMPILATION_CACHE=off` leaves it off.
    """
    import jax

    from aif.models.catalogue import cache_folder

    if os.environ.get("AIF_COMPILATION_CACHE") == "off" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def environment() -> dict[str, str]:
    """Versions and devices, for the record of a run."""
    import jax

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["devices"] = ", ".join(f"{d.platform}:{d.device_kind}" for d in jax.devices())
    found["cpus"] = str(os.cpu_count())
    return found


def write_record(config: dict[str, Any], folder: Path, command: str) -> None:
    """The resolved config, the environment and a script that runs the same again."""
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
    (folder / "reproduce.sh").write_text(
        "#!/bin/sh\n# Runs the same experiment again, in a new folder beside this file's.\n"
        'cd "$(dirname "$0")"\n'
        f"exec {shlex.join(command.split()[:2])} config.yaml --out ../{folder.name}-again\n"
    )


class Stopped(Exception):
    """The process was asked to stop and has saved its state. `status` is its exit status."""

    def __init__(self, status: int, where: Path | None):
        self.status = status
        super().__init__(f"stopped; continue with --resume in {where}" if where else "stopped")


class StopRequests:
    """While open, SIGTERM and SIGINT set `status` (143, 130) instead of ending the process; a second one ends it.

    Of several processes that are one run each hears of it at another time, so they agree on the step: jax's own
    handler of SIGTERM, which was installed when they joined, stays, and `asked` reads it.
    """

    def __init__(self) -> None:
        self.status = 0
        self._before: dict[int, object] = {}

    def asked(self, step: int) -> int:
        """The status at the end of `step`, the same in all processes."""
        if several():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self.status = 128 + signal.SIGTERM if reached_preemption_sync_point(step) else 0
        return self.status

    def __enter__(self) -> StopRequests:
        if several():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._on)
            except ValueError:  # not the main thread: leave signals alone
                break
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.status:
            sys.exit(128 + number)
        self.status = 128 + number
