"""Arms x seeds x metrics -> results with paired intervals, verdicts and answers, and the report.

Every arm starts from the same shared stage, on the same data, with the same adapter shape, batch size and seed. What
takes long is done once and kept under the hash of what decides it: stages, reference log-probabilities, activations,
every finished metric. A comparison that was cut off continues where it stopped, and comparisons whose folders lie side
by side share what they have in common.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif import fairness
from aif import results as records
from aif.accounts import account
from aif.adapter import change, changed
from aif.assembly import Findings, assemble
from aif.basins import Bench, Measured, Subject
from aif.cache import Cache, content_hash, digest
from aif.config import Config
from aif.corpus.check import overlap
from aif.directions import as_adapter, mean_difference, response_means, save_direction
from aif.directions.activations import Activations
from aif.directions.record import origin, purpose, read_from
from aif.errors import BadInput
from aif.experiment import Experiment, tables_by_candidate
from aif.log import Progress
from aif.measured import packed, unpacked
from aif.objectives import Objective
from aif.objectives.dpo import reference_logprobs
from aif.objectives.sft import sft
from aif.plugins import plugin
from aif.policy import Policy
from aif.profiles import profiles_of
from aif.runtime import write_record
from aif.samples import steered_samples
from aif.train import Trained, prepared
from aif.types import Direction

HARMLESS = ("name", "measure", "questions", "resamples", "samples", "checkpoint", "log", "launch")  # to a metric


@dataclass
class Comparison:
    """The state of one comparison while it runs; `results` grows phase by phase."""

    experiment: Experiment
    folder: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unequal: list[records.Unequal] = field(default_factory=list)

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


def compare(
    config: Config,
    folder: Path,
    *,
    progress: Progress,
    command: str = "aif compare",
    cache: Cache | None = None,
    launch: Callable[[Comparison], None] | None = None,
) -> records.Results:
    """Run the whole comparison into `folder` and return its results; `results.json` and `samples.jsonl` are written.

    Args:
      cache: where finished work is kept; `aif-cache` beside the folder when left out.
      launch: trains stages elsewhere, into the folder; whatever it leaves undone is trained here.
    """
    cache = cache or Cache(beside(folder), say=progress.say)
    run = Comparison(Experiment(config, cache), folder, progress)
    e = run.experiment
    with run.phase("model and corpus"):
        check_plan(run)
        write_record(config.model_dump(mode="json"), folder, command)
    if launch is not None:
        with run.phase("jobs"):
            launch(run)
    trained = {seed: train_arms(run, seed) for seed in config.seeds}
    with run.phase("direction"):
        activations, direction, layer = extract(run)
    subjects = subjects_of(run, trained, as_adapter(direction, layer))
    measured = measure(run, make_bench(run, subjects, paths_of(run, trained)))
    with run.phase("samples"):
        samples = sampled(run, direction, activations, layer)
    with run.phase("budget"):
        spent = account(e, trained)
    run.unequal += fairness.spent(spent)
    with run.phase("statistics"):
        results = assemble(
            e, Findings(trained, measured, direction, activations, layer, samples, spent, run.unequal, run.notes)
        )
    with run.phase("profiles"):
        results.profiles = profiles_of(e, speakers(e, trained))
    results.seconds = run.seconds
    results.save(folder / "results.json")
    (folder / "samples.jsonl").write_text("".join(s.model_dump_json() + "\n" for s in samples))
    return results


def beside(folder: Path) -> Path:
    """The cache that the runs of one folder of runs share."""
    return folder.absolute().parent / "aif-cache"


def check_plan(run: Comparison) -> None:
    """Find what would otherwise be found wrong only after training, and say what the arms differ in.

    Raises:
      BadInput: what the arms need, the held-out rows or the layer to steer is not right; arms with unequal data.
    """
    e, config = run.experiment, run.config
    e.check(*config.arms)
    e.data("target", config.corpus.heldout)
    c = config.corpus
    asked = [row for spec in config.arms.values() for row in e.on(spec).rows(*c.train)]
    twice = overlap(asked, e.rows(c.heldout, c.heldout_domain))["prompts"]
    if twice:
        run.notes.append(
            f"{twice} held-out prompts are asked in training too; what is measured on them is not held out."
        )
    if c.domains and not any(row.domain in c.domains for row in e.rows(c.heldout)):
        raise BadInput(f"corpus.domains: no row with split {c.heldout!r} is of {' or '.join(c.domains)}; name others")
    last = e.lm.config.layers - 1
    if config.direction.layer is not None and not 0 <= config.direction.layer <= last:
        raise BadInput(f"direction.layer: {config.direction.layer} is out of range; the model has layers 0..{last}")
    run.unequal = fairness.planned(e)
    for difference in run.unequal:
        told = "; ".join(f"{arm}: {value}" for arm, value in difference.values.items())
        run.progress.say(f"arms differ in {difference.what}: {told}")


def train_arms(run: Comparison, seed: int, arms: Sequence[str] | None = None) -> dict[str, Trained]:
    """The shared stage and every arm (or these), for one seed."""
    e, config, out = run.experiment, run.config, {}
    trainable: Any = e.fresh(seed)
    folder = run.folder / "stages" / f"seed-{seed}"
    common = {"seed": seed, "progress": run.progress}
    if config.start is not None:
        with run.phase("shared stage"):
            out["start"] = e.train(config.start, trainable, name="start", folder=folder / "start", **common)
        trainable = out["start"].trainable
    reference = e.reference(trainable)
    objectives = {arm: e.objective(spec, reference) for arm, spec in config.arms.items()}
    tables = None
    if sum(o.responses in ("pair", "all") for o in objectives.values()) > 1:
        with run.phase("reference log-probabilities"):
            tables = shared_reference(run, trainable)
    for arm in config.arms if arms is None else arms:
        objective = objectives[arm]
        with run.phase(f"arm {arm}"):
            out[arm] = e.train(
                config.arms[arm],
                trainable,
                name=arm,
                folder=folder / arm,
                objective=objective,
                tables=tables if objective.responses in ("pair", "all") else None,
                **common,
            )
    return out


def shared_reference(run: Comparison, trainable: Any) -> dict[str, np.ndarray]:
    """ln E(y|x) of every training candidate under the arms' common start."""
    e = run.experiment
    data = e.data("all", *run.config.corpus.train)

    def make() -> dict[str, np.ndarray]:
        objective = Objective(sft().loss, prepare=reference_logprobs)
        scored = prepared(objective, e.reference(trainable), data, rows=run.config.batch.rows, key=jax.random.key(0))
        return tables_by_candidate(scored, ["reference_logps"])

    identity = {**e.identity, "reference": digest(trainable), "data": data.fingerprint}
    return e.cache.arrays("reference", identity, make)


def extract(run: Comparison) -> tuple[Activations, Direction, int]:
    """The contrast direction of the base model on training prompts, saved with its provenance."""
    e, config = run.experiment, run.config
    layer = config.direction.layer if config.direction.layer is not None else e.lm.config.layers // 2
    data = e.data("all", *config.corpus.train).some(config.direction.rows)
    identity = {**e.identity, "data": data.fingerprint, "of": "base model"}
    kept = e.cache.arrays(
        "activations", identity, lambda: response_means(e.base, data, rows=config.batch.rows)._asdict()
    )
    activations = Activations(**kept)
    provenance = {
        **origin(e.lm),
        **read_from(activations, data.fingerprint),
        **purpose(layer),
        "corpus": e.corpus.sha256,
    }
    direction = mean_difference(activations, data.tables["preference"] > 0, provenance=provenance)
    save_direction(direction, run.folder / "directions" / "contrast.safetensors")
    return activations, direction, layer


def subjects_of(run: Comparison, trained: dict[int, dict[str, Trained]], direction: Any) -> list[Subject]:
    """The solutions under measurement: every arm of every seed, and the direction as a vector."""
    full, base = run.config.adapter.kind == "full", run.experiment.base.params
    arms = [
        Subject(arm, change(stage.trainable, base) if full else stage.trainable, seed)
        for seed, stages in trained.items()
        for arm, stage in stages.items()
        if arm != "start"
    ]
    return [*arms, Subject("contrast direction", direction)]


def measure(run: Comparison, bench: Bench) -> list[Measured]:
    """Every metric of the config; one that was finished before is read back."""
    e, config = run.experiment, run.config
    decided = {
        **e.identity,
        "config": {k: v for k, v in config.model_dump(mode="json").items() if k not in HARMLESS},
        "corpus": e.corpus.sha256,
        "subjects": [(s.name, s.seed, s.control, digest(s.adapter)) for s in bench.subjects],
        "waypoints": config.checkpoint.waypoints,
    }
    out: list[Measured] = []
    for metric, options in config.measure.items():
        with run.phase(metric):
            module, checked = plugin("basins", metric, options, f"measure.{metric}")
            source = content_hash(Path(module.__file__ or "").read_text())  # another definition is another metric
            identity = {**decided, "metric": metric, "source": source, "options": checked.model_dump(mode="json")}
            found, notes = kept_measure(e.cache, identity, lambda m=module, o=checked: m.measure(bench, o), run.notes)
            out += found
            run.notes[:] = notes
    return out


def kept_measure(
    cache: Cache, identity: Any, make: Callable[[], list[Measured]], notes: list[str]
) -> tuple[list[Measured], list[str]]:
    """(what a metric measured, the notes with its own): measured now, or read back. A value that cannot be kept is
    measured again each time."""
    before = list(notes)
    fresh: list[Measured] = []

    def run() -> tuple[dict[str, Any], Any]:
        fresh.extend(make())
        arrays, made = packed(fresh) or ({}, None)
        return arrays, {"records": made, "notes": notes[len(before) :]}

    arrays, about = cache.packed("measured", identity, run)
    if about["records"] is None:
        return fresh or make(), [*before, *about["notes"]]
    return unpacked(arrays, about["records"]), [*before, *about["notes"]]


def sampled(run: Comparison, direction: Direction, activations: Activations, layer: int) -> list[records.Sample]:
    """Steered samples, or those that were drawn before."""
    e, config = run.experiment, run.config
    identity = {
        **e.identity,
        "direction": digest(direction.vector),
        "norms": digest(activations.norms),
        "layer": layer,
        "corpus": e.corpus.sha256,
        "config": config.model_dump(mode="json", include={"corpus", "samples", "seed"}),
    }
    make = lambda: [s.model_dump(mode="json") for s in steered_samples(e, direction, activations.norms, layer)]  # noqa: E731
    return [records.Sample(**s) for s in e.cache.record("samples", identity, make)]


def paths_of(run: Comparison, trained: dict[int, dict[str, Trained]]) -> dict[tuple[str, int], dict[int, Any]]:
    """Where every arm was after some of its steps, from its start on, if waypoints were kept."""
    e, out = run.experiment, {}
    as_solution = partial(change, base=e.base.params) if run.config.adapter.kind == "full" else lambda values: values
    for seed, stages in trained.items():
        start = stages["start"].trainable if "start" in stages else e.fresh(seed)
        for arm, stage in stages.items():
            if arm != "start" and stage.waypoints:
                way = {0: start, **stage.waypoints, len(stage.lines): stage.trainable}
                out[arm, seed] = {step: as_solution(values) for step, values in way.items()}
    return out


def make_bench(run: Comparison, subjects: list[Subject], paths: dict[tuple[str, int], dict[int, Any]]) -> Bench:
    """Held-out data, the subjects and their paths. With `corpus.domains`, all other domains count as held out."""
    e, c = run.experiment, run.config.corpus
    asked = e.rows(c.heldout)
    inside = [k for k, row in enumerate(asked) if not c.domains or row.domain in c.domains]
    splits = (
        [c.heldout, c.heldout_domain] if c.domains else [c.heldout_domain if e.rows(c.heldout_domain) else c.heldout]
    )
    abroad = [k for k, row in enumerate(e.rows(*splits)) if row.domain not in c.domains]
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
        target=e.data("target", c.heldout).only(inside),
        alternatives=e.data("all", c.heldout).only(inside),
        alternatives_elsewhere=e.data("all", *splits).only(abroad),
        tokenizer=e.lm.tokenizer,
        rows=run.config.batch.rows,
        key=jax.random.key(run.config.seed),
        arms=tuple(run.config.arms),
        stance=c.target,
        training=e.data("target", *c.train),
        shown=e.rows(*c.train),
        asked=[asked[k] for k in inside],
        further=further,
        paths=paths,
        say=run.progress.say,
        note=run.notes.append,
    )


def speakers(e: Experiment, trained: dict[int, dict[str, Trained]]) -> dict[str, Policy]:
    """The base model and, for the first seed, every arm, each as a policy that can answer."""
    arms = next(iter(trained.values()))
    base = e.base.replace(remat="none")
    return {"base": base} | {arm: e.reference(arms[arm].trainable).replace(remat="none") for arm in e.config.arms}


def run_report(folder: Path, results: records.Results) -> Path:
    """Render the report of a results folder."""
    from aif.report import render

    return render(results, folder / "report.html")


__all__ = ["compare", "run_report"]
