"""A contract suite for objectives: run it on your own.

    import aif.testing
    aif.testing.check(my_objective)

A tiny random model, the bundled tiny corpus and an adapter are enough to see whether the engine may rely on an
objective: that its sums stay exact whatever the micro-batches, that padding counts nothing, that it has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from aif.objectives import Objective
from aif.types import Adapter, Batch, Loss, Mean

if TYPE_CHECKING:
    from aif.models.hub import LM
    from aif.policy import Policy

TOLERANCE = 3e-4  # of the largest number compared: float32 sums in another order
SLOPE = 1e-3  # the same for gradients, of the largest entry of an array


def check(objective: Objective, lm: LM | None = None) -> None:
    """Raise unless the objective keeps the contract of `aif.objectives`.

    Checked on rows of the bundled tiny corpus, or on samples where the objective draws its own: `prepare` and `loss`
    can be jitted; `prepare` returns finite facts per response slot, the same for the same key; the loss is a `Loss` of
    `Mean`s, finite, of positive weight; the adapter's gradient is finite and not zero; an adapter with B = 0 is the
    reference; empty rows change nothing, repeated rows count twice, the order of rows does not matter; the sums of two
    micro-batches are those of one batch, and so are the gradients; prompts packed into one row are as prompts apart.

    Args:
      lm: a model with a tokenizer; a random one of two layers when left out.

    Raises:
      AssertionError: naming what is wrong, in one line.
    """
    if lm is None:
        from aif.models.hub import load

        lm = load("tiny-random")
    from aif.policy import bind

    where = f"objective {objective.name!r}"
    adapter, batch = _adapter(lm), _batch(lm, objective)
    reference = bind(lm)
    batch = _with_facts(where, objective, reference, batch)

    def total(adapter: Adapter, reference: Policy, batch: Batch) -> tuple[Any, Any]:
        result = objective.loss(reference.replace(adapter=adapter), batch)
        _check_loss(where, result)
        return sum(m.sum for m in result.means), result

    graded = jax.jit(jax.value_and_grad(total, has_aux=True))
    run = lambda b: _call(f"{where}: loss", graded, adapter, reference, b)  # noqa: E731
    (_, whole), gradient = run(batch)
    _check_values(where, whole, gradient)
    first, second = (_take(batch, slice(n, n + 1)) for n in (0, 1))
    halves = [(result, slope) for (_, result), slope in map(run, (first, second))]
    added = jax.tree.map(lambda x, y: x + y, *halves)
    _same(f"{where}: two micro-batches do not add up to one batch", added, (whole, gradient))
    (_, padded), slope = run(_join(first, _empty(first)))
    _same(f"{where}: a row without a prompt or response is not free", (padded, slope), halves[0])
    (_, twice), slope = run(_join(first, first))
    double = jax.tree.map(lambda x: 2 * x, halves[0])
    _same(f"{where}: a row given twice does not count twice", (twice, slope), double)
    (_, swapped), slope = run(_join(second, first))
    _same(f"{where}: the order of rows matters", (swapped, slope), (whole, gradient))
    asleep = {name: {**target, "b": 0 * target["b"]} for name, target in adapter.items()}
    (_, unmoved), _ = _call(f"{where}: loss", graded, asleep, reference, batch)
    plain = _call(f"{where}: loss", jax.jit(objective.loss), reference, batch)
    _same(f"{where}: an adapter with B = 0 is not the reference", (unmoved, {}), (plain, {}))
    if objective.rollouts is None:
        apart = _with_facts(where, objective, reference, _batch(lm, objective, packed=False))
        (_, alone), slope = run(apart)
        _same(f"{where}: prompts packed into a row differ from prompts apart", (whole, gradient), (alone, slope))


def _with_facts(where: str, objective: Objective, reference: Policy, batch: Batch) -> Batch:
    """The batch with what `prepare` finds, after checking it."""
    prepare, key = jax.jit(objective.prepare), jax.random.key(0)
    facts, again = (_call(f"{where}: prepare", prepare, reference, batch, key) for _ in range(2))
    _check_facts(where, facts, batch, objective)
    for name in facts:
        if not np.array_equal(facts[name], again[name]):
            raise AssertionError(f"{where}: prepare's {name!r} differs between two calls with one key")
    return batch._replace(extras={**batch.extras, **facts})


def _call(where: str, function: Any, *values: Any) -> Any:
    try:
        return function(*values)
    except AssertionError:
        raise
    except Exception as error:  # whatever a user's function raises while it is traced
        what = (str(error).splitlines() or [""])[0][:200]
        raise AssertionError(f"{where} fails under jax.jit ({type(error).__name__}: {what})") from error


def _check_facts(where: str, facts: Any, batch: Batch, objective: Objective) -> None:
    if not isinstance(facts, Mapping):
        raise AssertionError(f"{where}: prepare returns {type(facts).__name__}; return a dict of arrays [B, R, ...]")
    for name, value in facts.items():
        if objective.rollouts is not None and np.shape(value)[:2] == batch.targets.shape:
            continue
        if not objective.cached and np.shape(value)[:1] == batch.ids.shape[:1]:
            continue
        if np.shape(value)[:2] != batch.ids.shape:
            raise AssertionError(
                f"{where}: prepare's {name!r} has shape {np.shape(value)}; facts are per response slot, "
                f"{batch.ids.shape} and whatever follows"
            )
        if not np.isfinite(np.asarray(value)[np.asarray(batch.ids) >= 0]).all():
            raise AssertionError(f"{where}: prepare's {name!r} is not finite for a response that is there")


def _check_loss(where: str, result: Any) -> None:
    if not isinstance(result, Loss) or not isinstance(result.total, Mean | tuple):
        raise AssertionError(f"{where}: loss returns {type(result).__name__}; return Loss(Mean(sum, weight), terms)")
    for name, term in _means(result).items():
        if not isinstance(term, Mean):
            raise AssertionError(f"{where}: term {name!r} is {type(term).__name__}; return Mean(sum, weight)")
        if jnp.shape(term.sum) or jnp.shape(term.weight):
            raise AssertionError(f"{where}: term {name!r} is an array; Mean holds two numbers")


def _means(result: Loss) -> dict[str, Mean]:
    """All means of a loss by name: the total or its parts, and the terms."""
    parts = {f"total {n}" if n else "total": mean for n, mean in enumerate(result.means)}
    return {**parts, **result.terms}


def _check_values(where: str, result: Loss, gradient: Adapter) -> None:
    for name, term in _means(result).items():
        if not np.isfinite(term.sum) or not np.isfinite(term.weight):
            raise AssertionError(f"{where}: {name} is {float(term.sum)} / {float(term.weight)}, not finite")
    if not all(mean.weight > 0 for mean in result.means):
        raise AssertionError(f"{where}: total has weight {float(result.means[0].weight)}; a loss weighs something")
    leaves = [np.asarray(target[leaf]) for target in gradient.values() for leaf in ("a", "b")]
    if not all(np.isfinite(x).all() for x in leaves):
        raise AssertionError(f"{where}: the adapter's gradient is not finite")
    if not any(x.any() for x in leaves):
        raise AssertionError(f"{where}: the adapter's gradient is zero; the loss does not depend on the policy")


def _same(message: str, got: tuple[Loss, Adapter], want: tuple[Loss, Adapter]) -> None:
    """Compare losses term by term and gradients leaf by leaf."""
    both = [_means(x) for x in (got[0], want[0])]
    for name in both[1]:
        mine, theirs = (means[name] for means in both)
        for part, x, y in zip(Mean._fields, mine, theirs, strict=True):
            if not abs(float(x) - float(y)) <= TOLERANCE * max(1.0, abs(float(y))):
                raise AssertionError(f"{message}: {name} has {part} {float(x):.6g} against {float(y):.6g}")
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        size = max(float(jnp.abs(y).max()), 1e-6)
        if not float(jnp.abs(x - y).max()) <= SLOPE * size:
            raise AssertionError(f"{message}: the gradient of {jax.tree_util.keystr(path)} differs")


def _adapter(lm: LM) -> Adapter:
    """A rank-2 adapter with B away from zero, where every objective has a slope."""
    from aif.adapter import lora

    fresh = lora(lm.config, rank=2, alpha=4.0, key=jax.random.key(1))
    noise = lambda n, x: 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(2), n), x.shape)  # noqa: E731
    return {name: {**target, "b": noise(n, target["b"])} for n, (name, target) in enumerate(fresh.items())}


def _batch(lm: LM, objective: Objective, packed: bool = True) -> Batch:
    """Four prompts in two rows (or one to a row) with the candidates that the objective asks for and their ratings; or
    two rows of its own samples."""
    from aif.corpus import bundled, load_scale, read

    dimensions = [d.id for d in load_scale().dimensions]
    rows = read(bundled("tiny")).rows
    if objective.rollouts is not None:
        return _sampled(lm, objective, rows[:4])
    options = {"which": objective.responses, "target": "discernment", "dimensions": dimensions}
    batch = _rows_of(lm, rows[:4], objective, options, packed)
    if objective.beside is None:
        return batch
    other = _rows_of(lm, rows[4:], objective, {**options, "which": objective.beside.responses}, packed)
    return batch._replace(beside=other)


def _rows_of(lm: LM, rows: Any, objective: Objective, options: dict[str, Any], packed: bool) -> Batch:
    """Four prompts, two or one to a row."""
    from aif.batches import build, stream
    from aif.sources import annotated

    length = max(len(e["tokens"]) for e in build(rows, lm.tokenizer, length=1 << 16, **options).examples)
    data = build(rows, lm.tokenizer, length=2 * length if packed else length, **options)
    data = annotated(replace(data, scored=length * (1 + packed), slots=8), rows, objective)
    found: list[Batch] = []
    for batch in islice(stream(data, rows=1, seed=0), 4):
        found += [] if any(np.isin(batch.ids[batch.ids >= 0], old.ids).any() for old in found) else [batch]
    return jax.tree.map(lambda *x: jnp.concatenate([jnp.asarray(y) for y in x]), *found)


def _sampled(lm: LM, objective: Objective, rows: Any) -> Batch:
    from aif.policy import bind
    from aif.rollouts import prompts_of, roll

    assert objective.rollouts is not None
    how = replace(objective.rollouts, new_tokens=8)
    batch, answers = roll(bind(lm), prompts_of(rows[:2], lm.tokenizer), [0, 1], how, jax.random.key(3))
    noted = {} if objective.annotate is None else objective.annotate(answers)
    ids = np.maximum(np.asarray(batch.ids), 0)
    extras = {**batch.extras, **{name: table[ids] for name, table in noted.items()}}
    return jax.tree.map(jnp.asarray, batch._replace(extras=extras))


def _take(batch: Batch, rows: slice) -> Batch:
    return jax.tree.map(lambda x: x[rows], batch)


def _join(first: Batch, second: Batch) -> Batch:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)


def _empty(batch: Batch) -> Batch:
    """As many rows, each of which holds nothing."""
    blank = jax.tree.map(jnp.zeros_like, batch)
    beside = None if batch.beside is None else _empty(batch.beside)
    return blank._replace(ids=blank.ids - 1, group=blank.group - 1, beside=beside)


__all__ = ["check"]
