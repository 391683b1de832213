"""What a run says: metrics.jsonl, TensorBoard, and a progress bar or plain lines.

On a terminal one bar shows the phase (compiling is a phase of its own), loss, tokens a second and the time left;
elsewhere one plain line is printed every `every` steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from aif.processes import first


class Metrics:
    """`metrics.jsonl` and TensorBoard events of one stage. Lines after the resumed step and a torn last one are cut.

    Of several processes that are one run all keep the lines, and the first writes them.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resumed_at: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        found = read_metrics(self.path) if self.path.exists() else []
        self.kept = [line for line in found if line["step"] <= resumed_at]
        self.file, self.board = None, None
        if not first():
            return
        cut = self.path.with_suffix(".tmp")
        cut.write_text("".join(json.dumps(line) + "\n" for line in self.kept))
        os.replace(cut, self.path)
        self.file = self.path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, line: dict[str, float]) -> None:
        """One line; `step` is its axis."""
        if self.file is None:
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Flush and close."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a metrics file; a last line torn by a kill is dropped."""
    lines = []
    for line in path.read_text().split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class Progress:
    """Phases and steps on the terminal. A context manager; `say` prints a line above the bar."""

    def __init__(self, *, quiet: bool = False, every: int = 1):
        from rich.console import Console

        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.every = every
        self.bar: Any = None
        self.task: Any = None
        self.phase = ""

    def __enter__(self) -> Progress:
        if self.live:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
            self.bar = Bar(
                *(TextColumn(c) if isinstance(c, str) else c for c in columns),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, phase: str, total: int, done: int = 0) -> None:
        """A new phase with `total` steps."""
        self.phase, self.total, self.began, self.printed = phase, total, time.monotonic(), 0.0
        if self.bar is not None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(phase, total=total, completed=done, note="")

    def compiling(self) -> None:
        """The next step compiles first."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"{self.phase}: compiling")

    def compiled(self, seconds: float) -> None:
        """Compilation took this long."""
        if self.bar is not None:
            self.bar.update(self.task, description=self.phase)
        self.say(f"{self.phase}: compiled in {seconds:.1f} s")

    def step(self, done: int, note: str = "") -> None:
        """`done` steps of the phase are finished; `note` says what they gave."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif done % self.every == 0 or done == self.total:
            spent = time.monotonic() - self.began
            self.say(f"{self.phase}: {done}/{self.total} {note} {spent:.0f} s")
