"""Transfer: is what a solution does one direction of the residual stream, and is it the direction of another solution?

    v_i = mean over response tokens of (residual of solution i - residual of the base model), same text, per layer
    produced_i(d) = effect of (base, h <- h + d v_i at one layer) / effect of i        in the base model, at dose d
    removed_ij    = 1 - effect of j where both j and the base model lose v_i / effect of j
                    losing v_i: h <- h - (h . vhat_i) vhat_i at every layer

An effect is the log-odds of target over contrast answers minus the base model's, per held-out prompt; shares are ratios
of sums over prompts. What projecting a direction out does to the base model itself is no part of what it removes.
Controls: random directions with the norm of v_i at every layer. v comes from training prompts.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.adapter import rescale
from aif.basins import Bench, Measured, Subject
from aif.basins.generality import log_odds, unclear
from aif.basins.geometry import about, share
from aif.basins.norms import moved
from aif.basins.scoring import carrying, grid_losses, losses
from aif.batches import Dataset
from aif.directions import as_adapter, random_direction, response_means
from aif.errors import BadInput
from aif.steering import project_out
from aif.types import Direction

QUANTITIES = ("effect produced by its own shift",)  # and `effect removed by the shift of NAME`


class Options(BaseModel, extra="forbid"):
    doses: list[float] = Field(
        [0.5, 1.0, 2.0, 4.0], min_length=1, description="multiples of the shift; 1 is measured too"
    )
    layer: int | None = Field(None, ge=0, description="where it is added; the middle one when left out")
    prompts: int | None = Field(16, ge=1, description="held-out prompts; all for null")
    shown: int = Field(16, ge=1, description="training prompts the shift is taken from")


def measure(bench: Bench, options: Options) -> list[Measured]:
    """The share produced, against dose, and the shares removed by every solution's shift, per solution."""
    data = bench.alternatives.some(options.prompts)
    if bench.training is None:
        raise BadInput("measure.transfer: this bench has no training rows to take shifts from (Bench.training)")
    text = bench.training.some(options.shown)
    score = lambda policy: log_odds(*losses(policy, data, rows=bench.rows), data)  # noqa: E731
    before, at_rest = score(bench.base), response_means(bench.base, text, rows=bench.rows).means
    found: list[tuple[Subject, Direction, np.ndarray]] = []
    for subject in moved(bench):
        bench.say(f"transfer: {subject.name}")
        policy = carrying(bench.base, subject.adapter)
        effect = score(policy) - before
        why = unclear(effect)
        if why:
            bench.note(f"transfer: {subject.name} is left out: its effect is {why}.")
            continue
        shift = (response_means(policy, text, rows=bench.rows).means - at_rest).mean(axis=0)
        found.append((subject, Direction(jnp.asarray(shift, jnp.float32), "adapter"), effect))
    out: list[Measured] = []
    for subject, direction, effect in found:
        bench.say(f"transfer: the shift of {subject.name} in the base model")
        out += _produced(bench, options, data, before, subject, direction, effect)
    return out + _removals(bench, data, found)


def _produced(
    bench: Bench,
    options: Options,
    data: Dataset,
    before: np.ndarray,
    subject: Subject,
    direction: Direction,
    effect: np.ndarray,
) -> list[Measured]:
    layer = bench.base.config.layers // 2 if options.layer is None else options.layer
    doses = sorted({*options.doses, 1.0})
    twin = Subject(f"random shift for {subject.name}", {}, subject.seed, True)
    out = []
    for who, one in ((subject, direction), (twin, random_direction(direction, bench.key))):
        family = Partial(rescale, as_adapter(one, layer))
        sums, tokens = grid_losses(bench.base, family, jnp.float32(doses), data, rows=bench.rows)
        part = np.stack([log_odds(column, tokens, data) - before for column in sums.T], axis=1)
        what = about(who, "held-out prompts", len(effect), metric="transfer", unit="%")
        curve, at_one = (
            partial(share, part=part, whole=effect),
            partial(share, part=part[:, doses.index(1.0)], whole=effect),
        )
        name = QUANTITIES[0]
        axis = {"x": tuple(doses), "x_label": "dose, in shifts"}
        out.append(Measured(quantity=f"{name}, by dose", better="", value=curve, **axis, **what))
        out.append(Measured(quantity=name, better="higher", value=at_one, **what))
    return out


def _removals(bench: Bench, data: Dataset, found: list[tuple[Subject, Direction, np.ndarray]]) -> list[Measured]:
    """Every shift of a seed, and a random direction, taken out of every solution of that seed and of the base model."""
    score = lambda policy: log_odds(*losses(policy, data, rows=bench.rows), data)  # noqa: E731
    layers, out = range(bench.base.config.layers), []
    for seed in dict.fromkeys(subject.seed for subject, _, _ in found):
        own = [(subject, direction, effect) for subject, direction, effect in found if subject.seed == seed]
        tried = [(f"the shift of {subject.name}", direction) for subject, direction, _ in own]
        tried.append(("a random direction", random_direction(own[0][1], jax.random.fold_in(bench.key, 1))))
        for name, direction in tried:
            bench.say(f"transfer: {name} taken out")
            edits = project_out(direction.vector, rows=1, layers=layers)
            floor = score(bench.base.replace(edits=edits))
            for subject, _, effect in own:
                left = score(carrying(bench.base, subject.adapter).replace(edits=edits)) - floor
                what = about(subject, "held-out prompts", len(effect), metric="transfer", unit="%", better="")
                value = partial(share, part=effect - left, whole=effect)
                out.append(Measured(quantity=f"effect removed by {name}", value=value, **what))
    return out
