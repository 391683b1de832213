"""Protocols: structured conversations that a system is led through, to see how it answers. Data, in YAML.

    name: everyday
    scenarios:
      - id: hens
        domain: farming
        turns:
          - My neighbour's hens eat my seedlings.
          - He says it is nature.

`about` (of the protocol), and `system` and `language` (of a scenario) may be given too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.corpus import yaml_tree
from aif.corpus.conversation import Message
from aif.errors import BadInput


@dataclass(frozen=True)
class Scenario:
    """What the user says, turn by turn, whatever is answered; `system` opens the conversation where it is given."""

    id: str
    domain: str
    turns: tuple[str, ...]
    system: str = ""
    language: str = ""

    @property
    def opening(self) -> tuple[Message, ...]:
        """The messages before the first turn."""
        return (Message("system", self.system),) if self.system else ()


@dataclass(frozen=True)
class Protocol:
    """A named list of scenarios."""

    name: str
    scenarios: tuple[Scenario, ...]


def load_protocol(path: str | Path) -> Protocol:
    """A protocol from its YAML file.

    Raises:
      BadInput: the file is no protocol; the message names the file, and the key or line.
    """
    return yaml_tree.load(path, _checked, "a protocol")


def _checked(tree: Any) -> Protocol:
    yaml_tree.keys(tree, "protocol", required=("name", "scenarios"), optional=("about",))
    if not isinstance(tree["scenarios"], list) or not tree["scenarios"]:
        raise BadInput("scenarios: must be a list of at least one scenario; give each an id and turns")
    scenarios = tuple(_scenario(entry, f"scenarios[{k}]") for k, entry in enumerate(tree["scenarios"]))
    yaml_tree.words([s.id for s in scenarios], "scenarios")
    return Protocol(yaml_tree.word(tree["name"], "name"), scenarios)


def _scenario(entry: Any, key: str) -> Scenario:
    yaml_tree.keys(entry, key, required=("id", "turns"), optional=("domain", "system", "language"))
    name = yaml_tree.word(entry["id"], f"{key}.id")
    turns = entry["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadInput(f"{key}.turns: must be a list of what the user says; give one turn or more (id {name!r})")
    said = tuple(yaml_tree.word(turn, f"{key}.turns[{k}]") for k, turn in enumerate(turns))
    rest = {n: yaml_tree.word(entry[n], f"{key}.{n}") for n in ("system", "language") if n in entry}
    return Scenario(name, yaml_tree.word(entry.get("domain", "general"), f"{key}.domain"), said, **rest)


__all__ = ["Protocol", "Scenario", "load_protocol"]
