"""Intervals, p-values and their correction: paired bootstrap over rows (and seeds), sign flips, Benjamini-Hochberg.

A resample draws rows with replacement; every subject of a metric is valued on the same draw, so that differences
between arms lose the variance that rows share. With several seeds a resample draws seeds too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from aif import results as records
from aif.basins import Measured

LEVEL = 95.0
FLIPS = 9999  # random sign flips of a test; all of them where there are fewer
Pair = tuple[str, str, str, str]  # metric, quantity, arm, baseline


def draws(rows: int, resamples: int, seed: int) -> np.ndarray:
    """Row weights `[resamples, rows]` of a bootstrap; the same for every quantity over the same number of rows."""
    generator = np.random.default_rng([seed, rows])
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)


def seed_draws(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """Seed weights `[resamples, seeds]`, summing to one."""
    generator = np.random.default_rng([seed, seeds, 1])
    return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds


def grouped(measured: list[Measured]) -> dict[tuple[str, str, str], list[Measured]]:
    """Measured quantities by (metric, quantity, subject): one entry per seed."""
    groups: dict[tuple[str, str, str], list[Measured]] = defaultdict(list)
    for m in measured:
        groups[m.metric, m.quantity, m.subject].append(m)
    return groups


def valued(group: list[Measured], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(value, resampled values `[resamples, ...]`) of a quantity, mean over seeds."""
    rows = group[0].rows
    plain = np.mean([np.asarray(m.value(np.ones(rows)), float) for m in group], axis=0)
    weights = draws(rows, resamples, seed)
    per_seed = np.stack([np.stack([np.asarray(m.value(w), float) for w in weights]) for m in group], axis=1)
    chosen = seed_draws(len(group), resamples, seed)
    return plain, np.einsum("rs,rs...->r...", chosen, per_seed)


def bounds(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of resampled values."""
    side = (100 - LEVEL) / 2
    low, high = np.nanpercentile(samples, [side, 100 - side], axis=0)
    return low, high


def contributions(group: list[Measured]) -> np.ndarray:
    """What each row brings to a scalar, `[rows]`: the jackknife's pseudo-values n f(1) - (n - 1) f(1 - e_i), mean over
    seeds. Their mean is f(1) for a mean over rows, where they are the rows' own values, and near it otherwise."""
    rows = group[0].rows
    if rows == 1:
        return np.mean([[float(m.value(np.ones(1)))] for m in group], axis=0)
    left_out = np.ones((rows, rows)) - np.eye(rows)
    whole = np.array([float(m.value(np.ones(rows))) for m in group])
    without = np.array([[float(m.value(w)) for w in left_out] for m in group])
    return np.mean(rows * whole[:, None] - (rows - 1) * without, axis=0)


def sign_flip(differences: np.ndarray, seed: int) -> float:
    """p of the mean of paired differences `[rows]` under random signs, two-sided: were arm and baseline exchangeable
    on every row, how often would their mean difference be at least as large? All 2^rows signs where there are few.

    Source: Fisher 1935, section 21, through `scipy.stats.permutation_test`.
    """
    from scipy.stats import permutation_test

    if len(differences) < 2 or not np.isfinite(differences).all():
        return 1.0
    test = permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        rng=np.random.default_rng([seed, len(differences), 2]),
    )
    return float(test.pvalue)


def adjusted(p: list[float]) -> list[float]:
    """Benjamini and Hochberg's (1995) p-values: rejecting those below q keeps the false discovery rate below q."""
    from scipy.stats import false_discovery_control

    return [float(x) for x in false_discovery_control(p, method="bh")] if p else []


def _label(group: list[Measured]) -> records.Label:
    return "measured" if group[0].control or len({m.seed for m in group}) > 1 else "single seed"


def scalar_and_curves(
    measured: list[Measured], resamples: int, seed: int
) -> tuple[list[records.Scalar], list[records.Curve]]:
    """Every quantity with its interval."""
    scalars, curves = [], []
    for (metric, quantity, subject), group in grouped(measured).items():
        first = group[0]
        value, samples = valued(group, resamples, seed)
        low, high = bounds(samples)
        shared = {
            "metric": metric,
            "quantity": quantity,
            "unit": first.unit,
            "arm": subject,
            "control": first.control,
            "n": first.rows,
            "rows": first.row_name,
            "seeds": sorted({m.seed for m in group}),
        }
        if first.x:
            points = {"value": value.tolist(), "low": low.tolist(), "high": high.tolist()}
            curves.append(records.Curve(**shared, **points, x=list(first.x), x_label=first.x_label))
        else:
            numbers = {"value": float(value), "low": float(low), "high": float(high)}
            scalars.append(records.Scalar(**shared, **numbers, better=first.better, label=_label(group)))  # pyright: ignore
    return scalars, curves


def difference(
    measured: list[Measured], baseline: str, arms: list[str], resamples: int, seed: int, asked: Sequence[Pair] = ()
) -> list[records.Difference]:
    """arm - baseline for every scalar that has a better side, and for the pairs that questions ask about; paired over
    rows and seeds. p-values are corrected over the whole list."""
    groups = grouped([m for m in measured if not m.x])
    table = [
        (metric, quantity, subject, baseline)
        for (metric, quantity, subject), group in groups.items()
        if subject in arms and subject != baseline and group[0].better
    ]
    found = []
    for metric, quantity, arm, against in dict.fromkeys([*table, *asked]):
        group, base = groups.get((metric, quantity, arm)), groups.get((metric, quantity, against))
        if group is not None and base is not None:
            found.append(_difference(group, base, resamples, seed))
    corrected = adjusted([d.p for d in found])
    return [d.model_copy(update={"p_adjusted": p}) for d, p in zip(found, corrected, strict=True)]


def _difference(group: list[Measured], base: list[Measured], resamples: int, seed: int) -> records.Difference:
    """An interval that excludes zero is a difference; the rule is fixed before the run. Seeds are those of both."""
    shared = {m.seed for m in group} & {m.seed for m in base}
    group, base = ([m for m in g if m.seed in shared] for g in (group, base))
    value, samples = valued(group, resamples, seed)
    base_value, base_samples = valued(base, resamples, seed)
    low, high = bounds(samples - base_samples)
    sign = {"higher": 1, "lower": -1}.get(group[0].better, 0)
    clear = sign != 0 and bool(low > 0 or high < 0)
    verdict = "no difference shown" if not clear else "arm better" if sign * (low + high) > 0 else "baseline better"
    return records.Difference(
        metric=group[0].metric,
        quantity=group[0].quantity,
        unit=group[0].unit,
        arm=group[0].subject,
        baseline=base[0].subject,
        value=float(value - base_value),
        low=float(low),
        high=float(high),
        p=sign_flip(contributions(group) - contributions(base), seed),
        p_adjusted=1.0,
        seeds=sorted(shared),
        verdict=verdict,
        label="not supported" if not clear else _label(group),
    )
