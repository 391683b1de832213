"""What arms differ in: found before training where the config says it, and from the logs where only training does.

Arms share the model, the start, the adapter's shape, the batch and the seeds by construction. Their objectives and the
options of their stages are what a comparison is about; whatever else differs is printed and recorded, and prompts that
some arms train on and others do not are refused unless the config says `unequal: [data]`.
"""

from __future__ import annotations

from collections.abc import Mapping

from aif.errors import BadInput
from aif.experiment import Experiment
from aif.results import Spent, Unequal


def planned(e: Experiment) -> list[Unequal]:
    """What the arms of a config differ in beside their objectives.

    Raises:
      BadInput: they train on different prompts, and the config does not say so.
    """
    config = e.config
    arms = {arm: e.settings(spec, config.seed) for arm, spec in config.arms.items()}
    prompts, answers = ({arm: e.trains_on(spec)[k] for arm, spec in config.arms.items()} for k in (0, 1))
    steps = "steps" if config.budget.match == "steps" else "steps, at most"
    found = [
        differing(steps, {a: s.steps for a, s in arms.items()}),
        differing(
            "optimizer", {a: ", ".join(f"{k}={v}" for k, v in vars(s.optimizer).items()) for a, s in arms.items()}
        ),
        differing("prompts", prompts, declared="data" in config.unequal),
        differing("answers read", answers),
    ]
    unequal = next((u for u in found if u is not None and u.what == "prompts" and not u.declared), None)
    if unequal is not None:
        told = "; ".join(f"{arm}: {value}" for arm, value in unequal.values.items())
        raise BadInput(f"arms: they train on different prompts ({told}); say `unequal: [data]` if that is meant")
    return [u for u in found if u is not None]


def spent(spent: list[Spent]) -> list[Unequal]:
    """What the arms came to differ in while they were trained."""
    first: dict[str, Spent] = {}
    for s in spent:
        first.setdefault(s.arm, s)
    found = [
        differing("steps taken", {a: s.steps for a, s in first.items()}),
        differing("tokens read", {a: s.tokens for a, s in first.items()}),
    ]
    return [u for u in found if u is not None]


def differing(what: str, values: Mapping[str, object], declared: bool = False) -> Unequal | None:
    """A record of what differs, or None where all arms have the same."""
    told = {arm: str(value) for arm, value in values.items()}
    return Unequal(what=what, values=told, declared=declared) if len(set(told.values())) > 1 else None
