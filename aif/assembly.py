"""Everything that a comparison found, as the records of `results.json`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import jax
import numpy as np

from aif import results as records
from aif.basins import Measured
from aif.config import Config
from aif.directions.activations import Activations
from aif.experiment import Experiment
from aif.questions import answers, pairs
from aif.runtime import environment
from aif.statistics import difference, scalar_and_curves
from aif.train import Trained
from aif.types import Direction


class Findings(NamedTuple):
    """What the phases of a comparison hand over."""

    trained: dict[int, dict[str, Trained]]
    measured: list[Measured]
    direction: Direction
    activations: Activations
    layer: int
    samples: list[records.Sample]
    spent: list[records.Spent]
    unequal: list[records.Unequal]
    notes: list[str]


NOTES = [
    "Intervals are 95 % percentile bootstrap over rows, and over seeds where there are several; differences resample "
    "the same rows for both arms.",
    "p-values are of sign flips over rows, two-sided, corrected by Benjamini and Hochberg over all differences.",
    "Random controls are Gaussian with the same norm in every module and layer.",
    "Losses count response tokens of held-out prompts only, token-weighted.",
]
MATCHED = {
    "steps": "Matched by steps: arms start from the same shared stage and take the steps that the config gives them. "
    "Packed rows hold the same number of tokens, so a step costs every arm of a corpus the same; an arm that reads all "
    "candidates of a prompt passes over fewer prompts per step.",
    "tokens": "Matched by tokens: arms start from the same shared stage and read the same number of tokens, prompts "
    "and samples included; the step that crosses the number is the last.",
    "kl": "Matched by KL: arms start from the same shared stage and train until KL(start || arm) on target answers of "
    "training prompts has reached the same value; the budget shows what each reached.",
}


def assemble(e: Experiment, found: Findings) -> records.Results:
    """All records of the comparison in the results schema."""
    config, measured = e.config, found.measured
    baseline = config.baseline or next(iter(config.arms))
    scalars, curves = scalar_and_curves(measured, config.resamples, seed=config.seed)
    compared = difference(measured, baseline, list(config.arms), config.resamples, config.seed, pairs(config))
    single = [] if len(config.seeds) > 1 else ["One training seed: intervals cover rows, not training runs."]
    return records.Results(
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command="aif compare",
        environment=environment(),
        config=config.model_dump(mode="json"),
        model=_model(e),
        corpus=_corpus(e),
        arms=list(config.arms),
        baseline=baseline,
        budget=records.Budget(match=config.budget.match, value=config.budget.value, arms=found.spent),
        unequal=found.unequal,
        answers=answers(config, compared),
        scalars=scalars,
        curves=curves,
        differences=compared,
        cosines=cosines({a: t.trainable for a, t in next(iter(found.trained.values())).items()}, config),
        training=_logs(config, found.trained),
        directions=[_direction(found)],
        samples=found.samples,
        notes=[MATCHED[config.budget.match], *NOTES, *found.notes, *single],
    )


def _model(e: Experiment) -> dict[str, Any]:
    sizes = {"layers": e.lm.config.layers, "width": e.lm.config.width}
    return {"source": e.config.model.source, "weights": e.lm.fingerprint, **sizes}


def _corpus(e: Experiment) -> dict[str, Any]:
    counts = {"rows": len(e.corpus.rows), "skipped": len(e.corpus.skipped)}
    return {"path": str(e.config.corpus.path), "sha256": e.corpus.sha256, **counts}


def _logs(config: Config, trained: dict[int, dict[str, Trained]]) -> list[records.TrainingLog]:
    stages = {**({"start": config.start} if config.start else {}), **config.arms}
    return [
        records.TrainingLog(arm=arm, seed=seed, stage=arm, objective=stages[arm].objective.name, lines=t.lines)
        for seed, arms in trained.items()
        for arm, t in arms.items()
    ]


def _direction(found: Findings) -> records.DirectionRecord:
    direction, layer = found.direction, found.layer
    return records.DirectionRecord(
        name="contrast direction",
        kind=direction.kind,
        layer=layer,
        norm=float(np.linalg.norm(direction.vector[layer])),
        residual_norm=float(found.activations.norms[layer]),
        provenance={k: v for k, v in direction.provenance.items() if k != "norms"},
    )


def cosines(solutions: dict[str, Any], config: Config) -> dict[str, Any]:
    """Cosine between the arms' weight updates sum <scale A B, scale' A' B'>, without building A B."""
    if config.adapter.kind != "lora":
        return {}
    names = list(solutions)

    def inner(x: Any, y: Any) -> float:
        total = 0.0
        for target in x:
            a = np.einsum("lir,lis->lrs", x[target]["a"], y[target]["a"])
            b = np.einsum("lro,lso->lrs", x[target]["b"], y[target]["b"])
            total += float(np.einsum("l,l,lrs,lrs->", x[target]["scale"], y[target]["scale"], a, b))
        return total

    host = {n: jax.tree.map(np.asarray, s) for n, s in solutions.items()}
    norm = {n: np.sqrt(max(inner(s, s), 1e-30)) for n, s in host.items()}
    matrix = [[inner(host[a], host[b]) / (norm[a] * norm[b]) for b in names] for a in names]
    return {"names": names, "matrix": matrix, "what": "weight updates of the adapters (shared stage included)"}
