"""An experiment made from its config: objectives, and one arm's stages."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif import adapter as adapters
from aif.basins.scoring import divergences
from aif.batches import Dataset
from aif.budget import Budget
from aif.cache import Cache, content_hash, digest
from aif.config import OptimizerSection, Stage
from aif.corpus import find_frame
from aif.directions.activations import response_means
from aif.directions.probes import Rated
from aif.directions.use import edits_from
from aif.errors import BadInput
from aif.log import Progress
from aif.material import Material
from aif.meaning import meaning
from aif.models.quantised import in_few_bits
from aif.models.weights import fingerprint
from aif.objectives import Objective, Unfitted
from aif.plugins import plugin
from aif.policy import Policy
from aif.rollouts import Prompts, prompts_of
from aif.sharding import place, shared
from aif.sources import annotated
from aif.steering import parse_scope, reach
from aif.train import Optimizer, Settings, Trained, check_head, prepared, stage

ANSWERS = {
    "target": "the target answer",
    "pair": "the target answer and one other",
    "all": "all candidates",
    "none": "samples of its own",
}


@dataclass(frozen=True)
class Experiment(Material):
    """A config with what it names loaded, and its stages; what takes long is looked up in the cache first."""

    cache: Cache = Cache()
    _rated: dict[int, tuple[Any, Rated]] = field(default_factory=dict, repr=False)
    _elsewhere: dict[tuple[str, str], Experiment] = field(default_factory=dict, repr=False)

    def rated(self, reference: Policy) -> Rated:
        """Mean residuals of all training candidates under a reference, with their ratings; found once per reference."""
        values = reference.params if reference.adapter is None else reference.adapter
        kept = self._rated.get(id(values))
        if kept is None or kept[0] is not values:
            data = self.data("all", *self.config.corpus.train)
            identity = {**self.identity, "reference": digest(values), "data": data.fingerprint}
            means = self.cache.arrays("readings", identity, lambda: self._means(reference, data))["means"]
            tables, prompts = data.tables, np.array(data.owners)[:, 0]
            found = Rated(means, tables["ratings"], prompts, tables["preference"] > 0)
            kept = self._rated[id(values)] = (values, found)
        return kept[1]

    def _means(self, reference: Policy, data: Dataset) -> dict[str, np.ndarray]:
        return {"means": np.asarray(response_means(reference, data, rows=self.config.batch.rows).means)}

    @property
    def identity(self) -> dict[str, Any]:
        """What everything that is computed with the model depends on."""
        return {"weights": self.lm.fingerprint, "compute_dtype": self.config.model.compute_dtype}

    def on(self, spec: Stage) -> Experiment:
        """This experiment on the corpus that a stage reads: itself, unless the stage names one of its own."""
        if spec.corpus is None:
            return self
        name = (spec.corpus.path, spec.corpus.target)
        if name not in self._elsewhere:
            section = self.config.corpus.model_copy(update=spec.corpus.model_dump())
            config = self.config.model_copy(update={"corpus": section})
            made = self._elsewhere[name] = replace(self, config=config, _rated={}, _elsewhere={})
            made.__dict__.update(lm=self.lm, mesh=self.mesh, base=self.base)  # one model for all
        return self._elsewhere[name]

    def objective(self, spec: Stage, reference: Policy | None = None) -> Objective:
        """The objective a stage names, with its options; `reference` is what its reader may look into."""
        name, options = spec.objective.name, spec.objective.options
        if ":" in name:
            module, _, attribute = name.partition(":")
            try:
                made = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError, ValueError) as error:
                raise BadInput(f"objective.name: {name!r} cannot be imported ({error}); give module:name") from error
            if not isinstance(made, Objective):
                try:
                    inspect.signature(made).bind(**options)
                except (TypeError, ValueError) as error:
                    raise BadInput(f"objective {name}: cannot be called with these options ({error})") from error
                made = made(**options)
            if not isinstance(made, Objective):
                raise BadInput(f"objective {name}: makes {type(made).__name__}; make an aif.Objective")
            return made
        module, checked = plugin("objectives", name, options, f"objective {name}")
        seen = {"reference": reference, "tokenizer": self.lm.tokenizer, "frame": self.frame, "steps": spec.steps}
        e = self.on(spec)
        if reference is not None:
            seen["rated"] = lambda: e.rated(reference)
        return module.make(checked, replace(e.context, **seen))

    def frame(self, name: str) -> str:
        """The text of a frame, by its name (see `aif.corpus.find_frame`)."""
        return find_frame(name, self.corpus.rows)

    def check(self, *arms: str) -> None:
        """Read model and corpus, and try what the shared stage and these arms need, before any training.

        Raises:
          BadInput: an objective, the rows it trains on or the adapter is not right.
        """
        _ = self.scale, self.corpus, self.mesh, self.lm, self.fresh(0)
        for name, spec in (("start", self.config.start), *((f"arms.{arm}", self.config.arms[arm]) for arm in arms)):
            if spec is not None:
                self.steered(spec, name)
        for spec in (self.config.start, *(self.config.arms[arm] for arm in arms)):
            if spec is None:
                continue
            try:
                objective = self.objective(spec)
            except Unfitted:  # it has checked what can be checked before the shared stage is trained
                continue
            check_head(objective, self.config.adapter.kind == "full")
            check_rows(objective, shared(self.mesh))
            if objective.rollouts is None:
                self.on(spec).encoded(objective)

    def trains_on(self, spec: Stage) -> tuple[str, str]:
        """In words, what a stage trains on: its prompts, and which answers to them it reads."""
        e = self.on(spec)
        prompts = f"{len(e.rows(*self.config.corpus.train))} prompts"
        if spec.corpus is not None:
            prompts += f" of {spec.corpus.path}"
        try:
            objective = self.objective(spec)
        except Unfitted:
            return prompts, "what its reader or reward is fitted to ask for"
        if objective.beside is not None:
            prompts += f" and {len(e.outside(objective, objective.beside.domains))} of other domains"
        return prompts, ANSWERS[objective.responses]

    def examples(self, objective: Objective, tables: dict[str, np.ndarray] | None) -> Dataset | Prompts:
        """What an objective trains on: the prompts it samples answers to, or encoded candidates with `tables` of
        facts and the objective's own annotations."""
        split = self.config.corpus.train
        if objective.rollouts is not None:
            return prompts_of(self.rows(*split), self.lm.tokenizer)
        data = self.encoded(objective)
        if tables is not None:
            data = data.with_tables(_select(tables, data))
        return annotated(data, self.rows(*split), objective)

    def fresh(self, seed: int) -> Any:
        """Trainable values of a new run: an adapter, or a copy of all parameters."""
        a = self.config.adapter
        if a.kind == "full":
            if in_few_bits(self.base.params):
                raise BadInput(f"adapter.kind: weights of {self.config.model.source} are frozen in few bits; take lora")
            return self.base.params
        key = jax.random.fold_in(jax.random.key(seed), 1)
        if a.kind == "vector":
            made = adapters.steering_vector(self.lm.config, layers=a.layers)
        else:
            how = {"rank": a.rank, "alpha": a.alpha, "targets": a.targets, "layers": a.layers}
            made = adapters.lora(self.lm.config, **how, key=key)
        return place(made, self.mesh)

    def reference(self, trainable: Any) -> Policy:
        """The policy that carries these values: the habit of a stage that starts from them."""
        full = self.config.adapter.kind == "full"
        return self.base.replace(params=trainable) if full else self.base.replace(adapter=trainable)

    def steered(self, spec: Stage, name: str = "stage") -> Policy:
        """The base model under the edits of a stage: they act while it trains, so that the weights need not learn what
        the edits do already, and are gone afterwards (Chen et al. 2025, Persona vectors, section 5.2).

        Raises:
          BadInput: the file, its layer or the scope is not right.
        """
        if spec.steer is None:
            return self.base
        try:
            edits = edits_from(self.lm, steer=spec.steer)
            return self.base.replace(edits=edits, reach=reach(parse_scope(spec.steer_scope)))
        except BadInput as error:
            raise BadInput(f"{name}.steer: {error}") from error

    def settings(self, spec: Stage, seed: int) -> Settings:
        """How a stage is trained."""
        c = self.config
        optimizer: OptimizerSection = spec.optimizer or c.optimizer
        matched = c.budget.value is not None and any(spec is arm for arm in c.arms.values())  # no other stage is
        budget = c.budget if matched and c.budget.match != "steps" else None
        return Settings(
            steps=int(c.budget.value) if matched and budget is None and c.budget.value else spec.steps,
            optimizer=Optimizer(**optimizer.model_dump()),
            budget=None if budget is None else Budget(budget.match, budget.value, budget.every),  # pyright: ignore
            rows=c.batch.rows,
            accumulate=c.batch.accumulate,
            seed=seed,
            full=c.adapter.kind == "full",
            checkpoint_every=c.checkpoint.every,
            keep=c.checkpoint.keep,
            waypoints=c.checkpoint.waypoints,
            log_every=c.log.every,
            tensorboard=c.log.tensorboard,
        )

    def train(
        self,
        spec: Stage,
        trainable: Any,
        *,
        seed: int,
        name: str,
        folder: Path | None,
        progress: Progress,
        objective: Objective | None = None,
        tables: dict[str, np.ndarray] | None = None,
        origin: Any = None,
        new_data: bool = False,
    ) -> Trained:
        """One stage from `trainable`; its reference model is the policy it starts from, or that of `origin`. With a
        folder, a stage that another run has finished is read back; `new_data` as in `aif.train.stage`."""
        reference = self.reference(trainable if origin is None else origin)
        objective = objective or self.objective(spec, reference)
        if objective.about:
            progress.say(f"{name}: {json.dumps(objective.about)}")
        settings, steered = self.settings(spec, seed), self.steered(spec, name)
        data = self.on(spec).examples(objective, tables if spec.corpus is None else None)
        identity = self._identity(spec, trainable)
        identity["reference"] = None if origin is None else digest(origin)
        identity["steer"] = None if steered.edits is None else [spec.steer_scope, fingerprint(steered.edits._asdict())]
        meant = meaning(objective, data, settings, identity)
        kept = None if new_data else folder  # what two corpora made is no result of the second
        if kept is not None:
            self.cache.fetch(meant, kept)
        done = folder is not None and (folder / "done.json").exists()
        if isinstance(data, Dataset) and objective.cached and not done:
            progress.say(f"{name}: preparing {len(data.owners)} responses")
            data = prepared(objective, reference, data, rows=settings.rows, key=jax.random.key(seed))
        trained = stage(
            steered,
            trainable,
            objective,
            data,
            settings,
            reference=reference,
            folder=folder,
            progress=progress,
            name=name,
            identity=identity,
            distance=lambda policy: self.distance(reference, policy),
            new_data=new_data,
        )
        if kept is not None:
            self.cache.publish(meant, kept)
        return trained

    def distance(self, reference: Policy, policy: Policy) -> float:
        """KL(reference || policy) of the next token, nats per token, on target answers of some training prompts."""
        data = self.data("target", *self.config.corpus.train).some(self.config.budget.prompts)
        plain = [p.replace(remat="none") for p in (reference, policy)]
        sums, tokens = divergences(plain[0], plain[1:], data, rows=self.config.batch.rows)
        return float(sums.sum() / tokens.sum())

    def _identity(self, spec: Stage, trainable: Any) -> dict[str, Any]:
        """What a stage's result depends on beside its settings and data."""
        name, e = spec.objective.name, self.on(spec)
        source = Path(inspect.getfile(importlib.import_module(name.partition(":")[0]))) if ":" in name else None
        return {
            **self.identity,
            "adapter": self.config.adapter.model_dump(mode="json"),
            "start": digest(trainable),
            "corpus": [e.corpus.sha256, e.config.corpus.target, content_hash(repr(self.scale))],
            "hyperparameters": spec.objective.model_dump(mode="json"),
            "source": hashlib.sha256(source.read_bytes()).hexdigest()[:24] if source else None,
            "matched_on": self.config.budget.prompts if self.config.budget.match == "kl" else None,
        }


def check_rows(objective: Objective, parts: int) -> None:
    """Refuse rows of a second kind that devices cannot share evenly."""
    rows = objective.beside.rows if objective.beside is not None else None
    if rows is not None and rows % parts:
        raise BadInput(
            f"objective {objective.name}: rows: {rows} cannot be shared evenly by mesh.data x mesh.fsdp = {parts} "
            f"devices; take a multiple of {parts}"
        )


def _select(tables: dict[str, np.ndarray], data: Dataset) -> dict[str, np.ndarray]:
    """Facts keyed by (row, candidate), `[rows, candidates, ...]`, looked up for this data set's responses."""
    rows, candidates = np.array(data.owners).T
    return {name: table[rows, candidates] for name, table in tables.items()}


def tables_by_candidate(data: Dataset, names: list[str]) -> dict[str, np.ndarray]:
    """The inverse of `_select`: facts of an all-candidates data set as `[rows, candidates]` arrays."""
    rows, candidates = np.array(data.owners).T
    out = {}
    for name in names:
        table = np.zeros((rows.max() + 1, candidates.max() + 1, *data.tables[name].shape[1:]), data.tables[name].dtype)
        table[rows, candidates] = data.tables[name]
        out[name] = table
    return out
