"""The standard reward model of preference pairs (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1), on frozen features.

    P(c preferred to r) = sigmoid( r(y_c) - r(y_r) ),   minimise  - sum ln sigmoid( r_c - r_r ) + penalty / 2 ||w||^2

Pairs are the target answer of a prompt against each of its other answers. With a linear head the fit is a logistic
regression on differences of features without an intercept, solved by Newton's method.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from scipy.special import expit

from aif.errors import BadInput
from aif.objectives import Context
from aif.rewards import Reward
from aif.rewards.heads import HeadOptions, Task, fit_head, linear
from aif.types import Scalar

NEWTON = 30  # steps at most; a penalised logistic regression takes fewer than ten


class Options(HeadOptions):
    """Those of a head."""


def bradley_terry(
    chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"], *, margin: Scalar = 0.0, centre: Scalar = 0.0
) -> Float[Array, "*shape"]:
    """- ln sigmoid(r_c - r_r - margin) + centre (r_c + r_r)^2, per pair; minimised.

    `margin` is by how much the chosen response should lead, `centre` holds rewards near 0 (they are defined up to a
    constant; Eisenstein et al. 2023).
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centre * jnp.square(chosen + rejected)


def pairs_of(liked: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """`[pairs, 2]`: numbers of the target response of a prompt and of each other one."""
    found = [
        (c, r)
        for prompt in np.unique(prompts)
        for c in np.flatnonzero((prompts == prompt) & liked)
        for r in np.flatnonzero((prompts == prompt) & ~liked)
    ]
    return np.array(found, int).reshape(-1, 2)


def fit_pairs(differences: np.ndarray, penalty: float) -> np.ndarray:
    """argmin_w  - sum ln sigmoid(d . w) + penalty / 2 ||w||^2, for differences `[pairs, r]` of features."""
    w = np.zeros(differences.shape[1])
    for _ in range(NEWTON):
        p = expit(-differences @ w)
        slope = penalty * w - differences.T @ p
        curve = (differences * (p * (1 - p))[:, None]).T @ differences + penalty * np.eye(len(w))
        step = np.linalg.solve(curve, slope)
        w = w - step
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    return w


def task_of(pairs: np.ndarray, flips: np.ndarray | None = None) -> Task:
    """Fit, loss and report over these pairs; `flips` turns some of them round for fitting."""
    sign = np.ones(len(pairs)) if flips is None else np.where(flips, -1.0, 1.0)

    def fit(z: np.ndarray, numbers: np.ndarray, penalty: float) -> np.ndarray:
        place = {n: i for i, n in enumerate(numbers)}
        known = [k for k, (c, r) in enumerate(pairs) if c in place and r in place]
        ends = np.array([(place[pairs[k, 0]], place[pairs[k, 1]]) for k in known], int).reshape(-1, 2)
        return fit_pairs((z[ends[:, 0]] - z[ends[:, 1]]) * sign[known][:, None], penalty)

    def lead(rewards: np.ndarray) -> np.ndarray:
        return rewards[pairs[:, 0]] - rewards[pairs[:, 1]]

    def report(rewards: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        led = lead(rewards)[mask[pairs[:, 0]]]
        return {"accuracy": float((led > 0).mean()) if len(led) else float("nan"), "pairs": float(len(led))}

    return Task(fit, lambda rewards: float(np.logaddexp(0, -lead(rewards)).sum()), report)


def make(options: Options, context: Context) -> Reward:
    """From a config: fitted on the training answers under the reference that the stage starts from.

    Raises:
      BadInput: too few prompts have a target answer and another one.
    """
    found = pairs_of(context.liked, context.prompts)
    prompts = len(np.unique(context.prompts[found[:, 0]]))
    if prompts < options.folds:
        raise BadInput(
            f"reward bradley_terry: {prompts} training prompts have a target answer and another one, and "
            f"{options.folds} folds need as many; add such prompts, or ask for fewer folds"
        )
    data = context.rated()
    pairs = pairs_of(data.liked, data.prompts)
    flips = np.random.default_rng([options.seed, 1]).random(len(pairs)) < 0.5
    task, control = task_of(pairs), task_of(pairs, flips)
    head, about = fit_head(data, Task(task.fit, task.loss, task.report, control), options)
    return linear(head, {"reward": "bradley_terry", **about})
