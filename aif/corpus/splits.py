"""Splitting a corpus by prompt: whole domains held out, and a share of the prompts of every other domain."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from aif.corpus.conversation import Conversation
from aif.corpus.jsonl import nearest
from aif.errors import BadInput


def split(
    rows: Sequence[Conversation], *, share: float, domains: Sequence[str] = (), seed: int = 0
) -> list[Conversation]:
    """The rows with `split` set to train, heldout or heldout_domain; scaffolding is left as it is.

    Rows that ask the same, whatever they are answered, share a split. A domain of two prompts or more gives at least
    one to `heldout` and keeps at least one for training.

    Raises:
      BadInput: a share outside (0, 1), or a domain that no row has.
    """
    if not 0 < share < 1:
        raise BadInput(f"heldout: {share} is no share; give a number between 0 and 1")
    known = sorted({row.domain for row in rows})
    for domain in domains:
        if domain not in known:
            raise BadInput(
                f"domains: no row has the domain {domain!r}{nearest(domain, known)}; choose from {', '.join(known)}"
            )
    asked: dict[str, list[object]] = {}
    for row in rows:
        prompts = asked.setdefault(row.domain, [])
        if row.kind != "scaffolding" and _question(row) not in prompts:
            prompts.append(_question(row))
    taken: set[object] = set()
    for domain, prompts in sorted(asked.items()):
        count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
        taken.update(random.Random(f"{seed}/{domain}").sample(prompts, max(0, count)))
    named = {True: "heldout", False: "train"}
    return [
        row
        if row.kind == "scaffolding"
        else replace(row, split="heldout_domain" if row.domain in domains else named[_question(row) in taken])
        for row in rows
    ]


def _question(row: Conversation) -> object:
    """What makes two rows the same prompt; text rows are their own."""
    return (row.domain, row.prompt or row.candidates[0].content)


__all__ = ["split"]
