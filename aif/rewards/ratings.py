"""A reward regressed on the corpus's ratings: ridge regression of a response's mean level on frozen features.

    y = sum_d weight_d level_d / (levels - 1) / sum_d |weight_d|
    minimise  sum (y - mean y - w . z)^2 + penalty ||w||^2

d runs over the dimensions that a response is rated in.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from aif.errors import BadInput
from aif.objectives import Context
from aif.plugins import nearest
from aif.rewards import Reward
from aif.rewards.heads import HeadOptions, Task, fit_head, linear


class Options(HeadOptions):
    weights: dict[str, float] = Field(
        default_factory=dict, description="of the scale's dimensions, below 0 for less of one; all 1 when left out"
    )


def composite(levels: np.ndarray, weights: np.ndarray, top: int) -> np.ndarray:
    """Weighted mean of level / top over the dimensions a response is rated in, `[N]`; NaN where it is in none."""
    known = (levels >= 0) & (weights != 0)
    total = (np.abs(weights) * known).sum(axis=1)
    score = (weights * np.where(known, levels, 0)).sum(axis=1) / top
    return np.where(total > 0, score / np.where(total > 0, total, 1.0), np.nan)


def ridge(z: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """(Z^T Z + penalty I)^-1 Z^T (y - mean y)."""
    return np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (y - y.mean()))


def task_of(y: np.ndarray, prompts: np.ndarray, labels: np.ndarray | None = None) -> Task:
    """Regress y (NaN is left out), or `labels` in its place as a control; the report is about y.

    Accuracy is the share of pairs of answers to one prompt, unequal in y, whose order the reward has right; r2 is of y
    centred within prompts, which is what a group-relative objective reads.
    """
    from scipy.stats import spearmanr

    fitted = y if labels is None else labels
    known = np.isfinite(y)

    def fit(z: np.ndarray, numbers: np.ndarray, penalty: float) -> np.ndarray:
        some = np.isfinite(fitted[numbers])
        return ridge(z[some] - z[some].mean(axis=0), fitted[numbers][some], penalty)

    def within(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        _, group = np.unique(prompts[mask], return_inverse=True)
        counts = np.bincount(group)
        return values[mask] - (np.bincount(group, values[mask]) / counts)[group]

    def loss(rewards: np.ndarray) -> float:
        return float(np.square(within(y, known) - within(rewards, known)).sum())

    def report(rewards: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        mask = mask & known
        pairs = [
            (i, j) for i in np.flatnonzero(mask) for j in np.flatnonzero(mask & (prompts == prompts[i])) if y[i] > y[j]
        ]
        right = [rewards[i] > rewards[j] for i, j in pairs]
        left, spread = np.square(within(y, mask) - within(rewards, mask)).sum(), np.square(within(y, mask)).sum()
        return {
            "accuracy": float(np.mean(right)) if right else float("nan"),
            "r2": float(1 - left / spread) if spread > 0 else float("nan"),
            "spearman": float(spearmanr(rewards[mask], y[mask])[0]),  # pyright: ignore[reportArgumentType]
        }

    return Task(fit, loss, report)


def make(options: Options, context: Context) -> Reward:
    """From a config: fitted on the rated training answers under the reference that the stage starts from.

    Raises:
      BadInput: a weight names no dimension, or too few prompts are rated.
    """
    unknown = [d for d in options.weights if d not in context.dimensions]
    if unknown:
        raise BadInput(
            f"reward ratings: weights.{unknown[0]}: the scale has no such dimension"
            f"{nearest(unknown[0], list(context.dimensions))}; it has {', '.join(context.dimensions)}"
        )
    weights = np.array([options.weights.get(d, 0.0 if options.weights else 1.0) for d in context.dimensions])
    top = max(1, len(context.levels) - 1)
    rated = np.isfinite(composite(context.ratings, weights, top))
    prompts = len(np.unique(context.prompts[rated]))
    if prompts < options.folds:
        raise BadInput(
            f"reward ratings: {prompts} training prompts have rated answers, and {options.folds} folds need as many; "
            "rate more, or ask for fewer folds"
        )
    data = context.rated()
    y = composite(data.levels, weights, top)
    shuffled = np.random.default_rng([options.seed, 1]).permutation(y)
    task = task_of(y, data.prompts)
    control = task_of(y, data.prompts, shuffled)
    head, about = fit_head(data, Task(task.fit, task.loss, task.report, control), options)
    return linear(head, {"reward": "ratings", **about})
