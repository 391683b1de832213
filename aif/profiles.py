"""Profiles before and after training: every arm answers held-out prompts, and probes on the base model read them."""

from __future__ import annotations

from collections.abc import Mapping

from aif import results as records
from aif.corpus import Message, profile
from aif.corpus.protocol import Protocol, Scenario
from aif.experiment import Experiment
from aif.policy import Policy
from aif.protocols import run
from aif.protocols.rating import beliefs, made_reader, rated
from aif.protocols.systems import speaking

READER = "probes"
FOLDS = 5  # of the probes' cross-validation, where there are prompts enough


def profiles_of(experiment: Experiment, policies: Mapping[str, Policy]) -> list[records.Profile]:
    """The profile of each policy's greedy answers to the first held-out prompts, by expected levels.

    The reader is fitted on the base model's residuals and reads all answers there, so that no arm is read through a
    representation of its own.
    """
    config, scale = experiment.config.samples, experiment.scale
    rows = experiment.rows(experiment.config.corpus.heldout)[: config.profiles]
    if not rows:
        return []
    prompts = len(experiment.rows(*experiment.config.corpus.train))
    reader = made_reader(experiment, READER, {"folds": max(2, min(FOLDS, prompts))})
    asked = Protocol("held-out", tuple(Scenario(r.id, r.domain, (_last(r.prompt),)) for r in rows))
    out = []
    for name, policy in policies.items():
        said = run(asked, speaking(policy, experiment.lm.tokenizer, tokens=config.tokens), name)
        found = rated(said, scale, *beliefs(reader, said, experiment.lm))
        seen = profile([r.candidates[0].extra["expected"] for r in found], scale)
        out.append(
            records.Profile(
                arm=name,
                reader=READER,
                answers=len(found),
                levels=list(scale.levels),
                dimensions={d.id: d.name for d in scale.dimensions},
                mean={d: m for d, m in seen.mean.items() if seen.count[d]},
                pinned_low=list(seen.pinned_low),
            )
        )
    return out


def _last(prompt: tuple[Message, ...]) -> str:
    return prompt[-1].content


__all__ = ["profiles_of"]
