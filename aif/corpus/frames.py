"""Frames: texts that a model has in its context, such as an instrument, a protocol or an essay. Never trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aif.corpus.conversation import Conversation
from aif.corpus.jsonl import nearest, refuse_foreign, regular_file
from aif.corpus.reader import read
from aif.errors import BadInput

BUNDLED = Path(__file__).parent / "bundled" / "frames.jsonl"


def find_frame(name: str, rows: Iterable[Conversation] = ()) -> str:
    """The text of a frame: a scaffolding row of a corpus or of the bundled ones, by its id, or a .txt file.

    Raises:
      BadInput: there is no such frame, or the file is not readable text.
    """
    if name.endswith(".txt"):
        return _file(regular_file(name))
    known = {r.id: r for r in (*read(BUNDLED).rows, *rows) if r.kind == "scaffolding"}
    if name not in known:
        listed = ", ".join(sorted(known))
        raise BadInput(f"frame: none is called {name!r}{nearest(name, known)}; name one of {listed}, or a .txt file")
    return known[name].candidates[0].content


def _file(path: Path) -> str:
    refuse_foreign(path)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:1: byte {error.start}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if not text:
        raise BadInput(f"{path}: is empty; write the text of the frame")
    return text


__all__ = ["find_frame"]
