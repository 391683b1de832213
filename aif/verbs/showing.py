"""Rows of a corpus on a terminal: in words, or as tokens with those in colour that are trained."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from aif.corpus import Conversation, Scale
from aif.corpus.tiers import target_of

TRAINED, READ = "black on green", "dim"


def shown(row: Conversation, scale: Scale) -> None:
    """Prompt, answers and ratings."""
    console = Console(highlight=False)
    facts = {"domain": row.domain, "language": row.language, "split": row.split, "kind": row.kind}
    console.print(Text(f"{row.id}  ", "bold"), Text(", ".join(v for v in facts.values() if v)), Text(row.where, "dim"))
    for message in row.prompt:
        console.print(Text(f"\n{message.role}", "bold"), Text(plain(message.content)), sep="\n")
    for answer in row.candidates:
        console.print(Text(f"\n{answer.stance or 'answer'}", "bold green"), Text(plain(answer.content)), sep="\n")
        rated = [f"{d.name} {scale.levels[answer.ratings[d.id]]}" for d in scale.dimensions if d.id in answer.ratings]
        console.print(Text(", ".join(rated), "dim"))


def masked(row: Conversation, lm: Any, target: str) -> None:
    """The tokens of the row with its target answer, the trained ones on a ground of their own, and their share."""
    from aif.batches import choose
    from aif.tokens import encode, pieces

    console = Console(highlight=False, soft_wrap=True)
    target_of(row, target)  # a row without an answer trains nothing
    encoded = encode(lm.tokenizer, row, choose(row, "target", target, 0), lm.config.max_position)
    found = pieces(lm.tokenizer, encoded)
    console.print(Text.assemble(*((plain(text), TRAINED if trained else READ) for text, trained in found)))
    trained = sum(on for _, on in found)
    console.print(f"\n{trained} of {len(found)} tokens are trained ({trained / len(found):.0%})")


def plain(text: str) -> str:
    """Text without characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
