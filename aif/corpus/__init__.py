"""Corpora: conversations with rated answers, the scales they are rated on, and plain text beside them."""

from __future__ import annotations

from pathlib import Path

from aif.corpus.conversation import Candidate, Conversation, Corpus, Message
from aif.corpus.frames import find_frame
from aif.corpus.jsonl import nearest
from aif.corpus.nexus import Dimension, Scale, load_scale
from aif.corpus.ratings import Profile, profile, quadratic_kappa
from aif.corpus.reader import read
from aif.errors import BadInput

BUNDLED = {"corpus": ".jsonl", "protocol": ".yaml"}


def bundled(name: str = "discernment", kind: str = "corpus") -> Path:
    """The file of a corpus that comes with the package: "discernment", or "tiny" for tests; or of a protocol.

    Raises:
      BadInput: there is no such corpus.
    """
    folder, ending = Path(__file__).parent / "bundled", BUNDLED[kind]
    names = sorted(p.stem for p in folder.glob(f"*{ending}"))
    if name not in names:
        raise BadInput(f"bundled:{name}: no such {kind}{nearest(name, names)}; there are {', '.join(names) or 'none'}")
    return folder / f"{name}{ending}"


def located(path: str | Path, kind: str = "corpus") -> Path:
    """The file that a path, or `bundled:NAME`, stands for."""
    named = str(path)
    return bundled(named.removeprefix("bundled:"), kind) if named.startswith("bundled:") else Path(path)


__all__ = [
    "Candidate",
    "Conversation",
    "Corpus",
    "Dimension",
    "Message",
    "Profile",
    "Scale",
    "bundled",
    "find_frame",
    "load_scale",
    "located",
    "profile",
    "quadratic_kappa",
    "read",
]
