"""What arms are matched by: steps, tokens, or the distance from their reference.

    steps    every arm takes the same number of updates
    tokens   an arm ends with the first step after which it has read so many tokens, prompts and samples included
    kl       an arm ends at the first look at which KL(reference || policy) has reached the value

A budget is spent or not according to the log lines of the stage alone, so a resumed stage ends where it would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Lines = list[dict[str, float]]


@dataclass(frozen=True)
class Budget:
    """`value` tokens, or nats per token from the reference looked at every `every` steps."""

    match: Literal["tokens", "kl"]
    value: float
    every: int = 1

    def spent(self, lines: Lines) -> bool:
        """Whether the steps so far have used the budget up."""
        if self.match == "tokens":
            return tokens(lines) >= self.value
        return bool(lines) and lines[-1].get("kl_from_reference", 0.0) >= self.value

    def due(self, step: int, last: int) -> bool:
        """Whether the KL is looked at after this step; always after the last."""
        return self.match == "kl" and (step % self.every == 0 or step == last)

    def steps(self, lines: Lines, most: int) -> int:
        """Steps that the stage is going to take, for its schedules: tokens so far say how many; a KL does not."""
        read = tokens(lines)
        if self.match == "kl" or not read:
            return most
        return max(1, min(most, round(self.value * len(lines) / read)))


def tokens(lines: Lines) -> int:
    """Tokens that these steps have read."""
    return int(sum(line["tokens"] for line in lines))


def achieved(lines: Lines, match: str) -> float | None:
    """What the stage spent of what it is matched by."""
    if match == "kl":
        return next((line["kl_from_reference"] for line in reversed(lines) if "kl_from_reference" in line), None)
    return tokens(lines) if match == "tokens" else len(lines)
