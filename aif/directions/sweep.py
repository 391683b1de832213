"""Which layer and which dose: effect against side effect over a grid, and the dose that a budget of the latter buys.

    effect(l, d) = mean over prompts of log-odds(target - contrast) steered - unsteered,   nats per token
    cost(l, d)   = KL( P(. | text) || P_steered(. | text) ) on pre-training-like text,     nats per token

Layer and dose are values of the edits, so the whole grid runs through programs that are compiled once. Recommended is
the largest effect whose interval excludes zero among the points that cost at most `max_kl`; beside it stand the Pareto
front and what steered answers look like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from pydantic import Field

from aif.basins.generality import log_odds
from aif.basins.scoring import divergences, losses
from aif.batches import Dataset, from_trees
from aif.corpus.pretraining import texts
from aif.errors import BadInput
from aif.policy import Policy
from aif.results import Record
from aif.runtime import environment
from aif.samples import Signs, continued
from aif.statistics import bounds, draws
from aif.steering import add
from aif.tokens import encode_text, tree
from aif.types import Direction

DOSES = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
VERSION = 1


class Point(Record):
    """One layer at one dose; `low` and `high` bound 95 % bootstrap intervals, over prompts and over texts."""

    layer: int
    dose: float
    effect: float
    effect_low: float
    effect_high: float
    kl: float
    kl_low: float
    kl_high: float
    reading: float | None = None  # change of an independent reader's value
    on_front: bool = False  # no other point has more effect for as little KL
    repetition: float | None = None  # means over the sampled answers
    compression: float | None = None
    perplexity: float | None = None


class Sweep(Record):
    """A grid of layers and doses with what was recommended and why."""

    version: int = VERSION
    created: str
    command: str
    environment: dict[str, str]
    direction: dict[str, Any]  # kind and provenance
    layers: list[int]
    doses: list[float]
    dose_unit: str = "mean residual norms of the layer"
    effect_unit: str = "nats/token, log-odds of target over contrast answers, steered minus unsteered"
    kl_unit: str = "nats/token on pre-training-like text"
    prompts: int
    texts: int
    max_kl: float
    points: list[Point] = Field(default_factory=list)
    plain: dict[str, float] = Field(default_factory=dict)  # the unsteered answers' signs of degeneration
    recommended: Point | None = None
    reason: str = ""

    def map(self, name: str) -> list[list[float]]:
        """A quantity of the points as `[layers][doses]`, for a figure."""
        values = {(p.layer, p.dose): getattr(p, name) for p in self.points}
        return [[values[layer, dose] for dose in self.doses] for layer in self.layers]

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self.model_dump_json(indent=1))
        temporary.replace(path)


@dataclass(frozen=True)
class Ground:
    """What a sweep measures on.

    `pairs` holds target and contrast answers (its table `preference` is +1 and -1), `texts` pre-training-like text;
    `asked` are prompts to answer under every edit, ended by `stop`; `decode` turns answers into text.
    """

    base: Policy
    pairs: Dataset
    texts: Dataset
    asked: Sequence[Sequence[int]] = ()
    stop: int = 0
    decode: Callable[[Sequence[int]], str] = str
    rows: int = 2


def text_data(tokenizer: Any, source: str, n: int, tokens: int) -> Dataset:
    """`n` passages of at most `tokens` tokens, all but the first token of each scored."""
    found = texts(source, n, max_chars=8 * tokens)
    ids = [encode_text(tokenizer, text)[:tokens] for text in found]
    return from_trees([tree(i[:1], [i[1:]]) for i in ids], {}, [(k, 0) for k in range(n)], length=tokens)


def sweep(
    ground: Ground,
    direction: Direction,
    norms: Float[np.ndarray, "L"],
    *,
    layers: Sequence[int],
    doses: Sequence[float] = DOSES,
    max_kl: float = 0.1,
    reader: Callable[[Policy, Dataset], float] | None = None,
    new_tokens: int = 32,
    resamples: int = 2000,
    seed: int = 0,
    command: str = "aif direction sweep",
    say: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Measure every layer at every dose along the direction, and recommend one.

    Args:
      norms: mean residual norm per layer, the unit of doses.
      max_kl: what the recommended dose may cost, nats per token.
      reader: an independent reading of the pairs under a policy; the change from the unsteered one is reported.

    Raises:
      BadInput: a layer does not exist, a dose is 0 or no number, or the budget is not positive.
    """
    _check(ground.base.config.layers, layers, doses, max_kl)
    base = ground.base.replace(remat="none")
    steered = lambda layer, dose: base.replace(  # noqa: E731
        edits=add(direction.vector, jnp.full(1, dose), jnp.asarray(norms), layers=[layer])
    )
    before = log_odds(*losses(base, ground.pairs, rows=ground.rows), ground.pairs)
    read = None if reader is None else reader(base, ground.pairs)
    points, plain = [], {}
    for layer in layers:
        say(f"sweep: layer {layer}")
        policies = [steered(layer, dose) for dose in doses]
        sums, tokens = divergences(base, policies, ground.texts, rows=ground.rows)
        signs = _answers(ground, base, direction, norms, layer, doses, new_tokens)
        plain = signs.get(0.0, {})
        for number, (dose, policy) in enumerate(zip(doses, policies, strict=True)):
            effect = log_odds(*losses(policy, ground.pairs, rows=ground.rows), ground.pairs) - before
            reading = None if reader is None or read is None else reader(policy, ground.pairs) - read
            numbers = _intervals(effect, sums[:, number], tokens, resamples, seed)
            points.append(Point(layer=layer, dose=dose, reading=reading, **numbers, **signs.get(dose, {})))
    points = front(points)
    chosen, reason = recommend(points, max_kl)
    return Sweep(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        environment=environment(),
        direction={"kind": direction.kind, **{k: v for k, v in direction.provenance.items() if k != "norms"}},
        layers=list(layers),
        doses=list(doses),
        prompts=len(before),
        texts=len(ground.texts.examples),
        max_kl=max_kl,
        points=points,
        plain=plain,
        recommended=chosen,
        reason=reason,
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The points, with those marked that no other one dominates: more effect at no more KL, or as much at less."""
    ahead = lambda a, b: a.effect >= b.effect and a.kl <= b.kl and (a.effect > b.effect or a.kl < b.kl)  # noqa: E731
    return [p.model_copy(update={"on_front": not any(ahead(q, p) for q in points)}) for p in points]


def recommend(points: Sequence[Point], max_kl: float) -> tuple[Point | None, str]:
    """The largest effect within the budget whose interval excludes zero, or None, and the reason in words."""
    within = [p for p in points if p.kl <= max_kl]
    moving = [p for p in within if p.effect_low > 0]
    if not within:
        cheapest = min(points, key=lambda p: p.kl)
        return None, f"no point costs at most {max_kl:g} nats/token; the cheapest costs {cheapest.kl:.3g}"
    if not moving:
        best = max(within, key=lambda p: p.effect)
        return None, (
            f"within {max_kl:g} nats/token no effect is clear of zero; the largest is {best.effect:+.3g} "
            f"[{best.effect_low:+.3g}, {best.effect_high:+.3g}] at layer {best.layer}, dose {best.dose:g}"
        )
    best = max(moving, key=lambda p: p.effect)
    return best, f"largest effect clear of zero among the {len(within)} points that cost at most {max_kl:g} nats/token"


def _check(L: int, layers: Sequence[int], doses: Sequence[float], max_kl: float) -> None:
    wrong = [layer for layer in layers if not 0 <= layer < L]
    if wrong or not layers:
        raise BadInput(f"sweep: layers {list(layers)} are not all of the model's; it has layers 0..{L - 1}")
    if not doses or not all(np.isfinite(d) and d != 0 for d in doses) or len(set(doses)) < len(doses):
        raise BadInput(f"sweep: doses {list(doses)} must be different finite numbers other than 0, the unsteered model")
    if not 0 < max_kl < np.inf:
        raise BadInput(f"sweep: max_kl {max_kl} must be a positive number of nats per token")


def _intervals(effect: np.ndarray, sums: np.ndarray, tokens: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Effect and KL with their bootstrap intervals; the same prompts and texts are drawn for every point."""
    prompts, passages = draws(len(effect), resamples, seed), draws(len(sums), resamples, seed + 1)
    effect_low, effect_high = bounds(prompts @ effect / prompts.sum(axis=1))
    kl_low, kl_high = bounds((passages @ sums) / (passages @ tokens))
    return {
        "effect": float(effect.mean()),
        "effect_low": float(effect_low),
        "effect_high": float(effect_high),
        "kl": float(sums.sum() / tokens.sum()),
        "kl_low": float(kl_low),
        "kl_high": float(kl_high),
    }


def _answers(
    ground: Ground,
    base: Policy,
    direction: Direction,
    norms: np.ndarray,
    layer: int,
    doses: Sequence[float],
    new_tokens: int,
) -> dict[float, dict[str, Any]]:
    """Mean signs of degeneration of greedy answers per dose, dose 0 among them: one batch for all doses of a layer."""
    if not ground.asked:
        return {}
    every = [0.0, *doses]
    asked = [prompt for prompt in ground.asked for _ in every]
    rows = jnp.tile(jnp.array(every), len(ground.asked))
    edits = add(direction.vector, rows, jnp.asarray(norms), layers=[layer])
    made = continued(base, base.replace(edits=edits), asked, ground.stop, ground.decode, new_tokens)
    mean = lambda k, name: float(np.mean([getattr(made[i].signs, name) for i in range(k, len(made), len(every))]))  # noqa: E731
    return {dose: {name: mean(k, name) for name in Signs._fields} for k, dose in enumerate(every)}
