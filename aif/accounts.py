"""What each arm cost: steps, tokens, seconds, the size of its change and its distance from the start."""

from __future__ import annotations

from aif.adapter import effective_norm
from aif.basins.scoring import divergences
from aif.budget import achieved
from aif.cache import digest
from aif.experiment import Experiment
from aif.results import Spent
from aif.train import Trained


def account(e: Experiment, trained: dict[int, dict[str, Trained]]) -> list[Spent]:
    """One record per arm and seed, in the order of the arms."""
    found = {seed: distances(e, seed, arms) for seed, arms in trained.items()}
    full = e.config.adapter.kind == "full"
    return [
        Spent(
            arm=arm,
            seed=seed,
            objective=spec.objective.name,
            steps=len(arms[arm].lines),
            tokens=arms[arm].tokens,
            seconds=round(arms[arm].seconds, 1),
            achieved=achieved(arms[arm].lines, e.config.budget.match),
            kl_from_start=found[seed][arm],
            effective_norm=None if full else float(effective_norm(arms[arm].trainable)),
        )
        for arm, spec in e.config.arms.items()
        for seed, arms in trained.items()
    ]


def distances(e: Experiment, seed: int, arms: dict[str, Trained]) -> dict[str, float]:
    """KL(start || arm) of every arm on target answers of held-out prompts, nats per token."""
    data = e.data("target", e.config.corpus.heldout)
    start = arms["start"].trainable if "start" in arms else e.fresh(seed)
    names = list(e.config.arms)

    def make() -> list[float]:
        reference, *policies = (
            e.reference(x).replace(remat="none") for x in (start, *(arms[a].trainable for a in names))
        )
        sums, tokens = divergences(reference, policies, data, rows=e.config.batch.rows)
        return (sums.sum(axis=0) / tokens.sum()).tolist()

    identity = {**e.identity, "data": data.fingerprint, "start": digest(start)}
    identity["arms"] = [digest(arms[a].trainable) for a in names]
    return dict(zip(names, e.cache.record("distances", identity, make), strict=True))
