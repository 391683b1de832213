"""Functional probes: does the model use what a probe reads?

A direction v at layer l is tried on prompts that neither it nor its reader was made from. h <- h + dose norm_l vhat
on all tokens, for doses from -2 to 2 residual norms, two things are watched: the reading of an independent reader at a
later layer, which is blind to v itself, and the log-odds of positive over negative responses. Then v is projected out
at every layer. The rule, fixed before any run (95 % bootstrap intervals over prompts):

    reading    the rise from the lowest to the highest dose is above zero and above the largest rise (either way) of
               random directions of the same norm; and no step between neighbouring doses is a fall, interval and all
    log-odds   the same of the log-odds
    ablation   the share of the reader's gap between positive and negative responses that goes is above zero and above
               that of every random direction
    readable   the direction's own coordinate tells the classes apart: its AUROC is above one half

    functional = reading, log-odds and ablation;    read-only = readable, not functional;    inert = neither
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from aif.batches import Dataset
from aif.directions.causal import Observed, Readout, log_odds, observe, per_prompt
from aif.directions.readable import auroc
from aif.directions.record import check_layer, units
from aif.errors import BadInput
from aif.policy import Policy
from aif.slots import Pool
from aif.statistics import bounds, draws
from aif.steering import add, project_out
from aif.types import Edits

DOSES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
RESAMPLES = 2000
VERDICTS = ("functional", "read-only", "inert")


@dataclass(frozen=True)
class Trial:
    """What directions are tried on: a model, responses that are given, which of them are positive, residual norms.

    `counted` says which responses of the data count, all for None; `positive` has an entry for each that does.
    """

    policy: Policy
    data: Dataset
    positive: Bool[np.ndarray, "N"]
    norms: Float[np.ndarray, "L"]
    rows: int = 2
    pool: Pool = "mean"
    counted: Bool[np.ndarray, "M"] | None = None

    @property
    def prompts(self) -> Int[np.ndarray, "N"]:
        return self.data.prompts if self.counted is None else self.data.prompts[self.counted]

    def seen(self, edits: Edits | None = None) -> Observed:
        """The responses that count, under the edits."""
        found = observe(self.policy, self.data, rows=self.rows, edits=edits, pool=self.pool)
        return found if self.counted is None else found.only(self.counted)

    def pushed(self, vector: Float[np.ndarray, "D"], layer: int, dose: float) -> Observed:
        """All responses with `dose` residual norms added along the vector at one layer."""
        edits = add(self._wide(vector), jnp.array([dose]), jnp.asarray(self.norms, jnp.float32), layers=[layer])
        return self.seen(edits)

    def ablated(self, vector: Float[np.ndarray, "D"]) -> Observed:
        """All responses with the vector projected out after every block."""
        return self.seen(project_out(self._wide(vector), rows=1, layers=range(len(self.norms))))

    def _wide(self, vector: np.ndarray) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(vector, jnp.float32), (len(self.norms), len(vector)))


@dataclass(frozen=True)
class Controls:
    """Random directions at one layer: what they do at the lowest and highest dose, and ablated. Made once a layer."""

    vectors: Float[np.ndarray, "C D"]
    ends: list[tuple[Observed, Observed]]
    ablated: list[Observed]

    def only(self, chosen: Bool[np.ndarray, "N"]) -> Controls:
        """The same for some of the responses."""
        ends = [(low.only(chosen), high.only(chosen)) for low, high in self.ends]
        return Controls(self.vectors, ends, [o.only(chosen) for o in self.ablated])


def controls(trial: Trial, layer: int, *, ends: tuple[float, float], count: int = 2, seed: int = 0) -> Controls:
    """Gaussian directions; pushes are as long as the direction's, because both are measured in residual norms."""
    drawn = np.random.default_rng([seed, layer]).normal(size=(count, trial.policy.config.width))
    vectors = units(drawn)
    pushed = [(trial.pushed(v, layer, ends[0]), trial.pushed(v, layer, ends[1])) for v in vectors]
    return Controls(vectors, pushed, [trial.ablated(v) for v in vectors])


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Functional:
    """What a direction does at one layer. `reading` (logits) and `log_odds` (nats per token) are means over prompts at
    each dose; `rise` is their change from the lowest to the highest dose, `random` the largest |rise| of the controls;
    `removed` is the share of the reader's gap that ablation takes, `log_odds_ablated` the log-odds it leaves."""

    layer: int
    reader_layer: int
    doses: tuple[float, ...]
    reading: list[Interval]
    reading_rise: Interval
    reading_random: float
    log_odds: list[Interval]
    log_odds_rise: Interval
    log_odds_random: float
    gap: Interval
    removed: Interval
    removed_random: float
    log_odds_ablated: Interval
    auroc: Interval
    passed: dict[str, bool]
    verdict: str
    prompts: int


def functional(
    trial: Trial,
    vector: Float[np.ndarray, "D"],
    layer: int,
    reader: Readout,
    *,
    doses: Sequence[float] = DOSES,
    base: Observed | None = None,
    random: Controls | None = None,
    seed: int = 0,
) -> Functional:
    """Dose-response and ablation of one direction at one layer, and the verdict of the rule above.

    Args:
      base: the trial's responses without any edit, when they are at hand.
      random: the controls of this layer, when they are at hand; they must have been made at the same end doses.

    Raises:
      BadInput: the layer does not exist, the reader is not later, the doses do not rise through 0, the direction is
        zero or not finite, or a prompt has responses of one class only.
    """
    doses = _checked(trial, vector, layer, reader, doses)
    base = trial.seen() if base is None else base
    random = random or controls(trial, layer, ends=(doses[0], doses[-1]), seed=seed)
    seen = [base if dose == 0 else trial.pushed(vector, layer, dose) for dose in doses]
    gone = trial.ablated(vector)
    return _judged(trial, vector, layer, reader, doses, base, seen, gone, random)


def _checked(
    trial: Trial, vector: np.ndarray, layer: int, reader: Readout, doses: Sequence[float]
) -> tuple[float, ...]:
    check_layer(layer, len(trial.norms))
    check_layer(reader.layer, len(trial.norms), "reader")
    if reader.layer <= layer:
        raise BadInput(f"reader: layer {reader.layer} is not later than the direction's {layer}; fit it on a later one")
    if list(doses) != sorted(set(doses)) or 0 not in doses or len(doses) < 3 or not doses[0] < 0 < doses[-1]:
        raise BadInput(f"doses: {list(doses)} do not rise through 0; give some below and some above, and 0 itself")
    if not np.isfinite(vector).all() or not np.any(vector):
        raise BadInput("direction: it is zero or not finite at this layer; choose another layer")
    return tuple(float(d) for d in doses)


def _judged(
    trial: Trial,
    vector: np.ndarray,
    layer: int,
    reader: Readout,
    doses: tuple[float, ...],
    base: Observed,
    seen: list[Observed],
    gone: Observed,
    random: Controls,
) -> Functional:
    positive, prompts = trial.positive, trial.prompts
    every = np.ones(len(positive), bool)
    read = lambda o: per_prompt(reader.read(o.means), every, prompts)  # noqa: E731
    odds = lambda o: log_odds(o.logps, positive, prompts)  # noqa: E731
    apart = lambda o: log_odds(reader.read(o.means), positive, prompts)  # noqa: E731
    reading, reading_ok = _dose_response(read, seen, random)
    logs, logs_ok = _dose_response(odds, seen, random)
    weights = draws(len(np.unique(prompts)), RESAMPLES, 0)
    gap, left = apart(base), apart(gone)
    removed = _of(1 - left.mean() / gap.mean(), 1 - (weights @ left) / (weights @ gap))
    chance = [1 - apart(o).mean() / gap.mean() for o in random.ablated]
    gap_interval = _mean(gap, weights)
    told = _auroc(base.means[:, layer] @ vector, positive, prompts)
    passed = {
        "reading": reading_ok,
        "log_odds": logs_ok,
        "ablation": gap_interval.low > 0 and removed.low > max(0.0, *chance),
        "readable": told.low > 0.5,
    }
    works = passed["reading"] and passed["log_odds"] and passed["ablation"]
    verdict = "functional" if works else "read-only" if passed["readable"] else "inert"
    facts: dict[str, Any] = {f"reading{k}": v for k, v in reading.items()} | {
        f"log_odds{k}": v for k, v in logs.items()
    }
    return Functional(
        layer=layer,
        reader_layer=reader.layer,
        doses=doses,
        gap=gap_interval,
        removed=removed,
        removed_random=float(max(chance)),
        log_odds_ablated=_mean(odds(gone), weights),
        auroc=told,
        passed=passed,
        verdict=verdict,
        prompts=len(gap),
        **facts,
    )


def _dose_response(value: Any, seen: list[Observed], random: Controls) -> tuple[dict[str, Any], bool]:
    """Means at each dose, the rise and the largest random one; whether the first two conditions of the rule hold."""
    table = np.stack([value(o) for o in seen])  # [doses, prompts]
    weights = draws(table.shape[1], RESAMPLES, 0)
    rise = _mean(table[-1] - table[0], weights)
    others = [_mean(value(high) - value(low), weights) for low, high in random.ends]
    largest = max(abs(o.value) for o in others)
    steps = [_mean(step, weights) for step in np.diff(table, axis=0)]
    ok = rise.low > largest and all(step.high >= 0 for step in steps)
    return {"": [_mean(row, weights) for row in table], "_rise": rise, "_random": largest}, ok


def _mean(values: Float[np.ndarray, "G"], weights: Float[np.ndarray, "R G"]) -> Interval:
    return _of(values.mean(), weights @ values / weights.sum(axis=1))


def _of(value: Any, samples: np.ndarray) -> Interval:
    low, high = bounds(samples)
    return Interval(float(value), float(low), float(high))


def _auroc(score: np.ndarray, positive: np.ndarray, prompts: np.ndarray, resamples: int = 400) -> Interval:
    """AUROC with an interval from resampled prompts."""
    names, number = np.unique(prompts, return_inverse=True)
    members = [np.flatnonzero(number == k) for k in range(len(names))]
    generator = np.random.default_rng(0)
    picks = (generator.integers(len(names), size=len(names)) for _ in range(resamples))
    rows = (np.concatenate([members[k] for k in pick]) for pick in picks)
    return _of(auroc(score, positive), np.array([auroc(score[r], positive[r]) for r in rows]))
