"""The schema of a YAML config, its overrides, and errors that name the key.

One schema serves `aif run` (one arm) and `aif compare` (all arms). An objective's or a metric's own options are the
pydantic model `Options` in its file; `name` picks the file. Unknown keys are errors that suggest the nearest name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from aif.errors import BadInput
from aif.plugins import Named, first_problem, plugin, sound

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # of folders that a run makes
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Section(BaseModel):
    """Base of every section: unknown keys and non-finite numbers are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _sound(cls, value: Any, info: ValidationInfo) -> Any:
        return sound(value, cls.model_fields[info.field_name or ""].annotation)


class Model(Section):
    source: str = Field(
        default="smollm2-135m", description="catalogue name, Hugging Face folder, .gguf file or owner/name"
    )
    chat_template: str | None = Field(default=None, description="jinja file, for a model without a template of its own")
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "linear", "full"] = "linear"


class TiersSection(Section):
    """Fields and defaults of `aif.corpus.tiers.Tiers`."""

    rating: float = Field(default=0.6, ge=0, description="weight of the mean rating, 0..1")
    depth: float = Field(default=0.2, ge=0, description="weight of turns and length")
    marked: float = Field(default=0.2, ge=0, description="weight of the markers together")
    markers: dict[str, float] = Field(default_factory=dict, description="marker: its weight; below 0 counts against")
    half_turns: PositiveFloat = Field(
        default=4.0, description="messages at which half of the depth of turns is reached"
    )
    half_words: PositiveFloat = Field(
        default=100.0, description="words at which half of the depth of length is reached"
    )
    by: Literal["quantile", "threshold"] = "quantile"
    high: float = Field(default=0.75, ge=0, le=1, description="quantile or score from which a row is in the high tier")
    mid: float = Field(default=0.25, ge=0, le=1, description="the same for the mid tier; rows below are broad")
    weights: dict[Literal["high", "mid", "broad"], PositiveFloat] = Field(
        default_factory=dict, description="what a row of a tier counts in the loss; 2, 1 and 0.5 when left out"
    )

    @model_validator(mode="after")
    def _ordered(self) -> TiersSection:
        if self.mid > self.high:
            raise ValueError(f"tiers: mid={self.mid} lies above high={self.high}; give the higher border to high")
        if not self.rating + self.depth + self.marked:
            raise ValueError("tiers: rating, depth and marked are all 0; give one of them a weight")
        return self


class CorpusSection(Section):
    path: str = Field(default="bundled:discernment", description="JSONL file, or bundled:NAME")
    scale: str = Field(default="nexus", description="name or YAML file of the rating scale")
    target: str = Field(default="discernment", description="stance whose answers are the target")
    train: tuple[str, ...] = Field(default=("train", ""), description="values of `split` to train on")
    heldout: str = "heldout"
    heldout_domain: str = "heldout_domain"
    domains: tuple[str, ...] = Field(default=(), description="train on these domains only; empty for all")
    columns: dict[str, str] = Field(default_factory=dict, description="our name: the file's name")
    on_bad_row: Literal["error", "skip"] = "error"
    limit: PositiveInt | None = Field(default=None, description="train on N prompts, spread evenly over the file")
    heldout_limit: PositiveInt | None = Field(default=None, description="measure on N prompts of each held-out split")
    tiers: TiersSection | None = Field(default=None, description="weigh training rows by tiers of a composite score")


class BatchSection(Section):
    rows: PositiveInt = 2
    length: PositiveInt = Field(default=512, description="tokens of a packed row")
    accumulate: PositiveInt = Field(default=1, description="micro-batches per step")


class MeshSection(Section):
    """How many devices an axis of `aif.sharding` has; all 1 for one device."""

    data: PositiveInt = Field(default=1, description="copies of the model that see different rows")
    fsdp: PositiveInt = Field(default=1, description="devices that see different rows and share the weights")
    tensor: PositiveInt = Field(default=1, description="devices among which every matrix product is split")


class AdapterSection(Section):
    kind: Literal["lora", "vector", "full"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    layers: tuple[int, ...] | None = None


class OptimizerSection(Section):
    learning_rate: PositiveFloat = 1e-3
    warmup: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    clip: float = Field(default=1.0, ge=0, description="bound on the gradient norm; 0 for none")


class StageCorpus(Section):
    """What a stage reads in place of the config's corpus, by the same columns, splits, domains and limit."""

    path: str = Field(description="JSONL file, or bundled:NAME")
    target: str = Field(description="stance whose answers are this stage's target")


class Stage(Section):
    objective: Named
    steps: PositiveInt
    optimizer: OptimizerSection | None = Field(
        default=None, description="replaces the config's optimizer in this stage"
    )
    corpus: StageCorpus | None = Field(
        default=None, description="trains on another corpus, such as one that controls for manner"
    )
    steer: str | None = Field(
        default=None, description="FILE:DOSE[@LAYER], added while this stage trains and not after"
    )
    steer_scope: str = Field(default="all", description="all, prompt, response, last, or positions as in 0,5:8")


class BudgetSection(Section):
    match: Literal["steps", "tokens", "kl"] = Field(default="steps", description="what every arm spends alike")
    value: PositiveFloat | None = Field(
        default=None, description="steps, tokens, or nats per token from the reference; `steps` of each arm if left out"
    )
    every: PositiveInt = Field(default=5, description="steps between looks at the KL")
    prompts: PositiveInt = Field(default=8, description="training prompts whose target answers the KL is taken on")

    @model_validator(mode="after")
    def _whole(self) -> BudgetSection:
        if self.match != "steps" and self.value is None:
            raise ValueError(f"value: match: {self.match} needs one; say how much every arm may spend")
        if self.match == "steps" and self.value is not None and self.value % 1:
            raise ValueError(f"value: {self.value} is no number of steps; give a whole one")
        return self


class Question(Section):
    """What the comparison is to answer, written down before it runs."""

    id: str = Field(default="", description="short name; the metric and quantity when left out")
    metric: str
    quantity: str
    arm: str
    baseline: str = Field(default="", description="the config's baseline when left out")
    direction: Literal["higher", "lower"] = Field(description="how the arm is claimed to stand to the baseline")
    minimum_effect: float = Field(default=0.0, ge=0, description="least difference that counts, in the quantity's unit")


class CheckpointSection(Section):
    every: PositiveInt = 50
    keep: PositiveInt = 3
    waypoints: int = Field(
        default=0, ge=0, description="steps of every arm after which its values are kept, for its path in geometry"
    )


class LogSection(Section):
    every: PositiveInt = 1
    tensorboard: bool = True


class DirectionSection(Section):
    layer: int | None = Field(default=None, description="layer to steer; the middle one when left out")
    rows: PositiveInt = Field(default=12, description="training prompts whose answers are contrasted")


class SamplesSection(Section):
    prompts: int = Field(default=2, ge=0)
    tokens: PositiveInt = 48
    dose: PositiveFloat = Field(default=0.5, description="residual norms along the direction, both ways")
    profiles: int = Field(
        default=0, ge=0, description="held-out prompts that all arms answer, to be read into profiles"
    )


class LaunchSection(Section):
    at_once: PositiveInt = Field(default=1000, description="jobs that run side by side")
    retries: int = Field(default=2, ge=0, description="how often a job that died is tried again")
    cluster: Literal["slurm", "local"] = Field(default="slurm", description="where submitit runs jobs")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="of submitit (timeout_min, slurm_partition, ...) or of Ray's tasks (num_gpus, ...)",
    )


class Config(Section):
    """A whole experiment."""

    name: str = Field(default="run", pattern=NAME)
    seed: Seed = 0
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    model: Model = Model()
    corpus: CorpusSection = CorpusSection()
    batch: BatchSection = BatchSection()
    mesh: MeshSection = MeshSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    start: Stage | None = Field(default=None, description="stage that every arm shares")
    arms: dict[str, Stage] = Field(min_length=1)
    baseline: str = Field(default="", description="arm the others are compared with; the first when left out")
    budget: BudgetSection = BudgetSection()
    unequal: tuple[Literal["data"], ...] = Field(default=(), description="what arms may differ in beside their stages")
    questions: tuple[Question, ...] = Field(default=(), description="answered by a fixed rule after the run")
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    direction: DirectionSection = DirectionSection()
    measure: dict[str, dict[str, Any]] = Field(default_factory=dict, description="metric: its options")
    samples: SamplesSection = SamplesSection()
    resamples: PositiveInt = 2000
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.baseline and self.baseline not in self.arms:
            raise ValueError(f"baseline: no arm is called {self.baseline!r}; arms are {', '.join(self.arms)}")
        wrong = [name for name in self.arms if name == "start" or not re.fullmatch(NAME, name)]
        if wrong:
            raise ValueError(f"arms.{wrong[0]}: not a name for an arm; use letters, digits, . _ -, and not `start`")
        if self.batch.rows % (parts := self.mesh.data * self.mesh.fsdp):
            raise ValueError(
                f"batch.rows: {self.batch.rows} cannot be shared evenly by mesh.data x mesh.fsdp = {parts} devices; "
                f"take a multiple of {parts}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is given twice; give each once")
        for name, stage in {**({"start": self.start} if self.start else {}), **self.arms}.items():
            optimizer, steps = stage.optimizer or self.optimizer, self.steps(name)
            if optimizer.warmup > steps:
                raise ValueError(f"{name}: optimizer.warmup={optimizer.warmup} is longer than steps={steps}")
        return self

    def steps(self, name: str) -> int:
        """Steps of an arm or of `start`, at most: its own, unless the budget gives all arms the same number."""
        if name == "start":
            assert self.start is not None
            return self.start.steps
        budget = self.budget
        return int(budget.value) if budget.match == "steps" and budget.value else self.arms[name].steps


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number and refuses a key given twice."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date or a number that cannot be one
            raise yaml.MarkedYAMLError(None, None, str(error), node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.MarkedYAMLError(None, None, "a key is a word, not a list or mapping", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config, apply `key.sub=value` overrides (`~key` deletes one), resolve `${...}` and check everything.

    Raises:
      BadInput: naming the file and line, or the key, and the fix.
    """
    path = Path(path)
    return check(_override(_read(path), overrides), str(path))


def check(tree: dict[str, Any], where: str = "config") -> Config:
    """A checked `Config` from nested dicts, with objectives' and metrics' own options checked too."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{where}: {first_problem(error, Config)}") from error
    for arm, stage in {**({"start": config.start} if config.start else {}), **config.arms}.items():
        key = "start.objective" if stage is config.start else f"arms.{arm}.objective"
        plugin("objectives", stage.objective.name, stage.objective.options, f"{where}: {key}")
    for metric, options in config.measure.items():
        plugin("basins", metric, options, f"{where}: measure.{metric}")
    if config.questions:
        from aif.questions import check_question
    for number, question in enumerate(config.questions):
        check_question(question, config, f"{where}: questions.{number}")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); name a YAML file") from error
    if len(text) > 1 << 20:
        raise BadInput(f"{path}: {len(text)} bytes is too large for a config; the limit is 1 MiB")
    try:
        if b"*" in text and any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text)):
            raise BadInput(f"{path}: YAML aliases are not read; use ${{key}} instead")
        tree = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or f"not valid YAML ({str(error).splitlines()[0][:80]})"
        raise BadInput(f"{path}{line}: {what}; mend the YAML") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: a config is a mapping of keys; this file holds {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for item in overrides:
        if not item.startswith("~") and "=" not in item:
            raise BadInput(f"{item}: an override reads key.sub=value, or ~key to delete one")
    at = "config"
    try:
        merged = OmegaConf.create(tree)
        for item in overrides:
            at = item
            if item.startswith("~"):
                parent, _, leaf = item[1:].rpartition(".")
                node = OmegaConf.select(merged, parent) if parent else merged
                if not OmegaConf.is_config(node) or leaf not in node:
                    raise BadInput(f"{item}: there is no such key to delete")
                del node[leaf]
            else:
                key, _, value = item.partition("=")
                OmegaConf.update(merged, key, yaml.load(value, _Loader), merge=False)  # noqa: S506
        at = "config"
        result = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "full_key", None) or at
        raise BadInput(f"{where}: {str(error).splitlines()[0]}; check the overrides and ${{...}} references") from error
    assert isinstance(result, dict)
    return {str(k): v for k, v in result.items()}
