"""The schema of `results.json`: every number that a report shows, with its unit, count, seeds and interval.

The report reads this file and nothing else; `aif.results.Results.model_json_schema()` is its JSON schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aif.errors import BadInput

VERSION = 2
Label = Literal["measured", "single seed", "not supported"]
Verdict = Literal["supported", "contradicted", "inconclusive", "single seed"]


class Record(BaseModel):
    """Base of every record: unknown keys are refused, NaN and infinity are written as such."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Scalar(Record):
    """One number of one arm. `low` and `high` bound its 95 % bootstrap interval over `n` rows (and the seeds)."""

    metric: str  # efficiency, stability, significance, generality, ...
    quantity: str  # "minimum loss", ...
    unit: str
    better: Literal["lower", "higher", ""]  # which way a larger benefit lies; "" where neither is better
    arm: str
    control: bool = False  # a random or base control rather than an arm
    value: float
    low: float
    high: float
    n: int
    rows: str = "rows"  # what was resampled: "held-out prompts", "texts", ...
    seeds: list[int]
    label: Label


class Curve(Record):
    """A quantity of one arm along a grid, with its interval at every point."""

    metric: str
    quantity: str
    unit: str
    arm: str
    control: bool = False
    x_label: str
    x: list[float]
    value: list[float]
    low: list[float]
    high: list[float]
    n: int
    rows: str = "rows"
    seeds: list[int]


class Difference(Record):
    """arm minus baseline on one scalar, by paired bootstrap: the same rows are resampled for both. `p` is that of a
    sign-flip test over rows, two-sided, and `p_adjusted` Benjamini-Hochberg's over all differences of the results."""

    metric: str
    quantity: str
    unit: str
    arm: str
    baseline: str
    value: float
    low: float
    high: float
    p: float
    p_adjusted: float
    seeds: list[int]
    verdict: Literal["arm better", "baseline better", "no difference shown"]
    label: Label


class Answer(Record):
    """A question of the config, and its verdict by the rule of `aif.questions`. The numbers are null where the
    quantity was not measured for the arm or its baseline."""

    id: str
    metric: str
    quantity: str
    unit: str
    arm: str
    baseline: str
    direction: Literal["higher", "lower"]
    minimum_effect: float
    value: float | None  # arm minus baseline
    low: float | None
    high: float | None
    p_adjusted: float | None
    verdict: Verdict
    reason: str


class Spent(Record):
    """What one arm cost for one seed."""

    arm: str
    seed: int
    objective: str
    steps: int
    tokens: int
    seconds: float
    achieved: float | None  # of what arms are matched by: steps, tokens, or nats per token from the reference
    kl_from_start: float  # KL(start || arm) on target answers of held-out prompts, nats per token
    effective_norm: float | None  # of the adapter; null when all weights were trained


class Budget(Record):
    """What arms were matched by, and what each spent."""

    match: Literal["steps", "tokens", "kl"]
    value: float | None
    arms: list[Spent]


class Unequal(Record):
    """Something in which arms differ: what each of them has. `declared` where the config had to say so."""

    what: str
    values: dict[str, str]
    declared: bool = False


class TrainingLog(Record):
    """Log lines of one stage of one arm: step, loss and every term, as `metrics.jsonl` holds them."""

    arm: str
    seed: int
    stage: str
    objective: str
    lines: list[dict[str, float]]


class Sample(Record):
    """A generated answer, steered along a direction at a dose in residual norms of the steered layer."""

    prompt: str
    arm: str  # model that answered: "base" or an arm
    direction: str  # empty when unsteered
    layer: int
    dose: float
    text: str
    tokens: int
    repetition: float  # share of 4-grams that were seen before in the same answer
    compression: float  # zlib size / size
    perplexity: float  # of the answer under the unsteered base model


class Profile(Record):
    """Mean levels of one arm's answers to held-out prompts, as one state reader reads them."""

    arm: str  # "base" or an arm
    reader: str
    answers: int
    levels: list[str]
    dimensions: dict[str, str]  # id: name
    mean: dict[str, float]  # dimensions the reader knows
    pinned_low: list[str]


class DirectionRecord(Record):
    """What a direction is made of, and how strong it is."""

    name: str
    kind: str
    layer: int
    norm: float
    residual_norm: float
    provenance: dict[str, Any]


class Results(Record):
    """Everything a comparison measured."""

    version: int = VERSION
    name: str
    created: str
    command: str
    environment: dict[str, str]
    config: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    arms: list[str]
    baseline: str
    budget: Budget
    unequal: list[Unequal] = Field(default_factory=list)  # what arms differ in
    answers: list[Answer] = Field(default_factory=list)
    scalars: list[Scalar] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    differences: list[Difference] = Field(default_factory=list)
    cosines: dict[str, Any] = Field(default_factory=dict)  # {"names": [...], "matrix": [[...]], "noise_floor": x}
    training: list[TrainingLog] = Field(default_factory=list)
    directions: list[DirectionRecord] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    profiles: list[Profile] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)  # what a reader must know: controls, rules, limits
    seconds: dict[str, float] = Field(default_factory=dict)  # wall time of each phase

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self.model_dump_json(indent=1))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read and check a results file.

        Raises:
          BadInput: missing, damaged, or written by a newer version.
        """
        try:
            text = path.read_bytes()
            version = json.loads(text).get("version")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadInput(f"{path}: no results here; run `aif compare` first") from error
        except (ValueError, AttributeError) as error:
            raise BadInput(f"{path}: not a results file: not a JSON object; run the comparison again") from error
        if version != VERSION:
            raise BadInput(
                f"{path}: results of version {version}, and this engine reads version {VERSION}; "
                "run `aif compare` again with --resume: what was trained is kept"
            )
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise BadInput(f"{path}: damaged results: {first}; run `aif compare` again with --resume") from error
