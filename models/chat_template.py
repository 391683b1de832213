"""Chat templates rendered where they can do no harm: in a child process, with little time, memory and output.

A template is a program from a stranger. jinja2's sandbox keeps it from the machine, but not from looping for ever or
filling the memory, and `strftime_now` would put today's date into the training text. The child knows jinja2 and
nothing else, is started once, and is ended and replaced when a template breaks a limit.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from aif.types import BadInput

SECONDS, MEGABYTES, OUTPUT = 2, 512, 8 << 20  # of CPU for one text, of memory, and bytes of one text
WAIT = 60  # wall seconds after which a child that uses no CPU is given up
TODAY = "2025-01-01"  # what every template takes for the date
CHILD = Path(__file__).with_name("template_child.py")


class Renderer:
    """The child process and the conversation with it; one request at a time."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, values: dict[str, Any]) -> str:
        """The template's text.

        Raises:
          ValueError: the template refuses the values, is not a template, or needs too much.
        """
        request = json.dumps([template, values]).encode() + b"\n"
        with self._lock:
            child = self._started()
            try:
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write(request)
                child.stdin.flush()
                line = self._answer(child)
            except BrokenPipeError:
                line = b""
            if not line:
                self.close()
                raise ValueError(f"it does not end within {SECONDS} seconds, or needs more than {MEGABYTES} MB")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            limits = [str(SECONDS), str(MEGABYTES), str(OUTPUT), TODAY]
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
            )
            atexit.register(self.close)
        return self._child

    def _answer(self, child: subprocess.Popen[bytes]) -> bytes:
        """One line of the child, empty when it died or kept silent.

        Silence is counted in waits of a second, not by the clock: a run that was stopped and goes on has not waited.
        """
        assert child.stdout is not None
        silent, parts = 0, []
        while silent < WAIT:
            if not select.select([child.stdout], [], [], 1.0)[0]:
                silent += 1
                continue
            part = child.stdout.read1(1 << 20)  # pyright: ignore[reportAttributeAccessIssue]
            parts.append(part)
            if not part or part.endswith(b"\n"):
                return b"".join(parts) if part else b""
        return b""

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


_renderer = Renderer()


def chat_text(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool, where: str) -> str:
    """The text that the tokenizer's chat template makes of these messages.

    Args:
      messages: role and content of every turn.
      answer_next: append the header of the assistant's turn.

    Raises:
      BadInput: the template refuses the messages, is damaged, or breaks a limit.
    """
    values = {"messages": messages, "add_generation_prompt": answer_next, "tools": None, "documents": None}
    values |= {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    try:
        return _renderer.render(tokenizer.get_chat_template(), values)
    except ValueError as error:
        raise BadInput(
            f"{where}: the chat template refuses this conversation: {error}; mend the roles, or take another template"
        ) from None
