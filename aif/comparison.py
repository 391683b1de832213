"""Arms x seeds x metrics -> results with paired intervals and verdicts, and the report.

Every arm starts from the same shared stage, on the same data, with the same adapter shape, batch size and seed. What
arms have in common (the shared stage, the reference log-probabilities) is computed once. A comparison that was cut off
continues where it stopped: finished stages are read back.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif import results as records
from aif.adapter import change, changed, effective_norm
from aif.basins import Bench, Measured, Subject
from aif.basins.scoring import divergences
from aif.checkpoint import load_arrays, save_arrays
from aif.config import Config
from aif.directions import as_adapter, mean_difference, response_means, save_direction
from aif.directions.activations import Activations
from aif.directions.record import origin, purpose, read_from
from aif.errors import BadInput
from aif.experiment import Experiment, tables_by_candidate, write_record
from aif.log import Progress
from aif.objectives import Objective
from aif.objectives.dpo import reference_logprobs
from aif.objectives.sft import sft
from aif.plugins import plugin
from aif.runtime import environment
from aif.samples import steered_samples
from aif.statistics import difference, scalar_and_curves
from aif.train import Trained, prepared
from aif.types import Direction


@dataclass
class Comparison:
    """The state of one comparison while it runs; `results` grows phase by phase."""

    experiment: Experiment
    folder: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return self.experiment.config

    @contextmanager
    def phase(self, name: str):
        """Time a phase and say that it begins."""
        self.progress.say(f"== {name}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)


def compare(config: Config, folder: Path, *, progress: Progress, command: str = "aif compare") -> records.Results:
    """Run the whole comparison into `folder` and return its results; `results.json` and `report.html` are written."""
    run = Comparison(Experiment(config), folder, progress)
    e = run.experiment
    with run.phase("model and corpus"):
        check_plan(run)
        write_record(e, folder, command)
    trained = {seed: train_arms(run, seed) for seed in config.seeds}
    with run.phase("direction"):
        activations, direction, layer = extract(run)
    full = config.adapter.kind == "full"
    subjects = [
        Subject(arm, change(stage.trainable, e.base.params) if full else stage.trainable, seed)
        for seed, arms in trained.items()
        for arm, stage in arms.items()
        if arm != "start"
    ]
    subjects.append(Subject("contrast direction", as_adapter(direction, layer)))
    bench = make_bench(run, subjects)
    measured: list[Measured] = []
    for metric, options in config.measure.items():
        with run.phase(metric):
            module, checked = plugin("basins", metric, options, f"measure.{metric}")
            measured += module.measure(bench, checked)
    with run.phase("samples"):
        samples = steered_samples(e, direction, activations.norms, layer)
    with run.phase("budget"):
        budget = budget_of(run, trained)
    results = assemble(run, trained, measured, direction, activations, layer, samples, budget)
    results.save(folder / "results.json")
    (folder / "samples.jsonl").write_text("".join(s.model_dump_json() + "\n" for s in samples))
    return results


def check_plan(run: Comparison) -> None:
    """Find what would otherwise be found wrong only after training.

    Raises:
      BadInput: what the arms need, the held-out rows or the layer to steer is not right.
    """
    e, config = run.experiment, run.config
    e.check(*config.arms)
    e.data("target", config.corpus.heldout)
    last = e.lm.config.layers - 1
    if config.direction.layer is not None and not 0 <= config.direction.layer <= last:
        raise BadInput(f"direction.layer: {config.direction.layer} is out of range; the model has layers 0..{last}")


def train_arms(run: Comparison, seed: int) -> dict[str, Trained]:
    """The shared stage and every arm, for one seed."""
    e, config, out = run.experiment, run.config, {}
    trainable: Any = e.fresh(seed)
    folder = run.folder / "stages" / f"seed-{seed}"
    if config.start is not None:
        with run.phase("shared stage"):
            out["start"] = e.train(
                config.start, trainable, seed=seed, name="start", folder=folder / "start", progress=run.progress
            )
        trainable = out["start"].trainable
    reference = e.reference(trainable)
    objectives = {arm: e.objective(spec, reference) for arm, spec in config.arms.items()}
    tables = None
    if sum(o.responses in ("pair", "all") for o in objectives.values()) > 1:
        with run.phase("reference log-probabilities"):
            tables = shared_reference(run, trainable, folder / "reference.safetensors")
    for arm, spec in config.arms.items():
        with run.phase(f"arm {arm}"):
            out[arm] = e.train(
                spec,
                trainable,
                seed=seed,
                name=arm,
                folder=folder / arm,
                progress=run.progress,
                objective=objectives[arm],
                tables=tables if objectives[arm].responses in ("pair", "all") else None,
            )
    return out


def shared_reference(run: Comparison, trainable: Any, path: Path) -> dict[str, np.ndarray]:
    """ln E(y|x) of every training candidate under the arms' common start, kept beside the stages."""
    e = run.experiment
    data = e.data("all", *run.config.corpus.train)
    if path.exists():
        kept, about = load_arrays(path)
        if about["data"] == data.fingerprint:
            return {"reference_logps": np.asarray(kept["reference_logps"])}
    objective = Objective(sft().loss, prepare=reference_logprobs)
    data = prepared(objective, e.reference(trainable), data, rows=run.config.batch.rows, key=jax.random.key(0))
    tables = tables_by_candidate(data, ["reference_logps"])
    save_arrays(path, tables, {"data": data.fingerprint})
    return tables


def extract(run: Comparison) -> tuple[Activations, Direction, int]:
    """The contrast direction of the base model on training prompts, saved with its provenance."""
    e, config = run.experiment, run.config
    layer = config.direction.layer if config.direction.layer is not None else e.lm.config.layers // 2
    data = e.data("all", *config.corpus.train).some(config.direction.rows)
    activations = response_means(e.base, data, rows=config.batch.rows)
    provenance = {
        **origin(e.lm),
        **read_from(activations, data.fingerprint),
        **purpose(layer),
        "corpus": e.corpus.sha256,
    }
    direction = mean_difference(activations, data.tables["preference"] > 0, provenance=provenance)
    save_direction(direction, run.folder / "directions" / "contrast.safetensors")
    return activations, direction, layer


def make_bench(run: Comparison, subjects: list[Subject]) -> Bench:
    """Held-out data and the subjects, for the metrics."""
    e, c = run.experiment, run.config.corpus
    elsewhere = c.heldout_domain if e.rows(c.heldout_domain) else c.heldout
    full = run.config.adapter.kind == "full"

    def further(subject: Subject, arm: str, steps: int) -> Any:
        spec = run.config.arms[arm].model_copy(update={"steps": steps})
        start = changed(e.base.params, subject.adapter)[0] if full else subject.adapter
        done = e.train(
            spec,
            start,
            seed=subject.seed + 1,
            name=arm,
            folder=None,
            progress=run.progress,
            origin=e.fresh(subject.seed),
        )
        return change(done.trainable, e.base.params) if full else done.trainable

    return Bench(
        base=e.base.replace(remat="none"),
        subjects=subjects,
        target=e.data("target", c.heldout),
        alternatives=e.data("all", c.heldout),
        alternatives_elsewhere=e.data("all", elsewhere),
        tokenizer=e.lm.tokenizer,
        rows=run.config.batch.rows,
        key=jax.random.key(run.config.seed),
        arms=tuple(run.config.arms),
        stance=c.target,
        training=e.data("target", *c.train),
        shown=e.rows(*c.train),
        asked=e.rows(c.heldout),
        further=further,
        say=run.progress.say,
        note=run.notes.append,
    )


def budget_of(run: Comparison, trained: dict[int, dict[str, Trained]]) -> dict[str, Any]:
    """Per arm: steps, tokens, wall seconds, effective norm, and KL from the arm's reference on held-out answers."""
    e, config = run.experiment, run.config
    data = e.data("target", config.corpus.heldout)
    out: dict[str, Any] = {}
    full = config.adapter.kind == "full"
    put = lambda x: e.base.replace(params=x, remat="none") if full else e.base.replace(adapter=x, remat="none")  # noqa: E731
    seed, arms = next(iter(trained.items()))
    start = arms["start"].trainable if "start" in arms else e.fresh(seed)
    policies = [put(arms[arm].trainable) for arm in config.arms]
    sums, tokens = divergences(put(start), policies, data, rows=config.batch.rows)
    kl = sums.sum(axis=0) / tokens.sum()
    for number, (arm, spec) in enumerate(config.arms.items()):
        out[arm] = {
            "objective": spec.objective.name,
            "steps": spec.steps,
            "tokens": arms[arm].tokens,
            "seconds": round(arms[arm].seconds, 1),
            "kl_from_start": float(kl[number]),
            "effective_norm": None if full else float(effective_norm(arms[arm].trainable)),
        }
    return out


def assemble(
    run: Comparison,
    trained: dict[int, dict[str, Trained]],
    measured: list[Measured],
    direction: Direction,
    activations: Activations,
    layer: int,
    samples: list[records.Sample],
    budget: dict[str, Any],
) -> records.Results:
    """All records of the comparison in the results schema."""
    e, config = run.experiment, run.config
    baseline = config.baseline or next(iter(config.arms))
    scalars, curves = scalar_and_curves(measured, config.resamples, seed=config.seed)
    against = [a for a in config.arms if a != baseline]
    differences = difference(measured, baseline, against, config.resamples, seed=config.seed)
    spec = lambda name: config.start if name == "start" else config.arms[name]  # noqa: E731
    logs = [
        records.TrainingLog(arm=arm, seed=seed, stage=arm, objective=spec(arm).objective.name, lines=t.lines)  # pyright: ignore
        for seed, arms in trained.items()
        for arm, t in arms.items()
    ]
    return records.Results(
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command="aif compare",
        environment=environment(),
        config=config.model_dump(mode="json"),
        model={
            "source": config.model.source,
            "weights": e.lm.fingerprint,
            "layers": e.lm.config.layers,
            "width": e.lm.config.width,
        },
        corpus={
            "path": str(config.corpus.path),
            "sha256": e.corpus.sha256,
            "rows": len(e.corpus.rows),
            "skipped": len(e.corpus.skipped),
        },
        arms=list(config.arms),
        baseline=baseline,
        budget=budget,
        scalars=scalars,
        curves=curves,
        differences=differences,
        cosines=cosines({a: t.trainable for a, t in next(iter(trained.values())).items()}, config),
        training=logs,
        directions=[
            records.DirectionRecord(
                name="contrast direction",
                kind=direction.kind,
                layer=layer,
                norm=float(np.linalg.norm(direction.vector[layer])),
                residual_norm=float(activations.norms[layer]),
                provenance={k: v for k, v in direction.provenance.items() if k != "norms"},
            )
        ],
        samples=samples,
        notes=NOTES
        + run.notes
        + ([] if len(config.seeds) > 1 else ["One training seed: intervals cover rows, not training runs."]),
        seconds=run.seconds,
    )


NOTES = [
    "Every arm starts from the same shared stage and sees the same data, batch size, steps and seed; arms differ in "
    "objective only. Packed rows hold the same number of tokens, so a step costs every arm the same; an arm that "
    "reads all candidates of a prompt passes over fewer prompts per step.",
    "Intervals are 95 % percentile bootstrap over rows; differences resample the same rows for both arms.",
    "Random controls are Gaussian with the same norm in every module and layer.",
    "Losses count response tokens of held-out prompts only, token-weighted.",
]


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


def run_report(folder: Path, results: records.Results) -> Path:
    """Render the report of a results folder."""
    from aif.report import render

    return render(results, folder / "report.html")


__all__ = ["compare", "run_report"]
