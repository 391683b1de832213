"""Intervals: paired bootstrap over rows (and seeds), and the verdicts that follow from them.

A resample draws rows with replacement; every subject of a metric is valued on the same draw, so that differences
between arms lose the variance that rows share. With several seeds a resample draws seeds too.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from aif import results as records
from aif.basins import Measured

LEVEL = 95.0


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
    measured: list[Measured], baseline: str, arms: list[str], resamples: int, seed: int
) -> list[records.Difference]:
    """arm - baseline for every scalar, paired over rows and seeds. An interval that excludes zero is a difference; the
    rule is fixed before the run."""
    groups = grouped([m for m in measured if not m.x])
    out = []
    for (metric, quantity, subject), group in groups.items():
        base = groups.get((metric, quantity, baseline))
        if subject not in arms or base is None or not group[0].better:
            continue
        value, samples = valued(group, resamples, seed)
        base_value, base_samples = valued(base, resamples, seed)
        low, high = bounds(samples - base_samples)
        sign = 1 if group[0].better == "higher" else -1
        clear = low > 0 or high < 0
        verdict = "no difference shown" if not clear else "arm better" if sign * (low + high) > 0 else "baseline better"
        out.append(
            records.Difference(
                metric=metric,
                quantity=quantity,
                unit=group[0].unit,
                arm=subject,
                baseline=baseline,
                value=float(value - base_value),
                low=float(low),
                high=float(high),
                verdict=verdict,  # pyright: ignore[reportArgumentType]
                label="not supported" if not clear else _label(group),
            )
        )
    return out
