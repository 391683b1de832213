"""Corpora: conversations with rated answers, the scales they are rated on, and plain text beside them."""

from __future__ import annotations

from pathlib import Path

from aif.corpus.conversation import Candidate, Conversation, Corpus, Message
from aif.corpus.jsonl import nearest
from aif.corpus.nexus import Dimension, Scale, load_scale
from aif.corpus.ratings import Profile, profile, quadratic_kappa
from aif.corpus.reader import read
from aif.errors import BadInput


def bundled(name: str = "discernment") -> Path:
    """The file of a corpus that comes with the package: "discernment", or "tiny" for tests.

    Raises:
      BadInput: there is no such corpus.
    """
    folder = Path(__file__).parent / "bundled"
    names = sorted(p.stem for p in folder.glob("*.jsonl"))
    if name not in names:
        raise BadInput(f"bundled:{name}: no such corpus{nearest(name, names)}; there are {', '.join(names)}")
    return folder / f"{name}.jsonl"


__all__ = [
    "Candidate",
    "Conversation",
    "Corpus",
    "Dimension",
    "Message",
    "Profile",
    "Scale",
    "bundled",
    "load_scale",
    "profile",
    "quadratic_kappa",
    "read",
]
