"""What an edit of the residual stream does to responses that are given: their residuals and their log-probabilities."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.batches import Dataset, once
from aif.directions.activations import Activations
from aif.directions.linear import fit_linear
from aif.directions.record import units
from aif.errors import BadInput
from aif.objectives.logprobs import response_sums, score_hidden
from aif.policy import Policy
from aif.sharding import shared
from aif.slots import Pool, response_means
from aif.types import Batch, Edits


class Observed(NamedTuple):
    """Residuals of each response after every block, and its mean ln p per token, in nats."""

    means: Float[np.ndarray, "N L D"]
    logps: Float[np.ndarray, "N"]

    def only(self, chosen: Bool[np.ndarray, "N"]) -> Observed:
        """Some of the responses."""
        return Observed(self.means[chosen], self.logps[chosen])


class Readout(NamedTuple):
    """An independent reader: h . weights + bias on the residual after `layer`; higher reads the positive class."""

    layer: int
    weights: Float[np.ndarray, "D"]
    bias: float

    def read(self, means: Float[np.ndarray, "N L D"]) -> Float[np.ndarray, "N"]:
        return means[:, self.layer] @ self.weights + self.bias


@partial(jax.jit, static_argnames="pool")
def _observed(policy: Policy, batch: Batch, pool: Pool) -> tuple[Array, Array, Array]:
    out = policy(batch, tap=response_means(batch, pool))
    logps = score_hidden(out.hidden, policy.head, batch)
    return out.taps, response_sums(logps, batch), response_sums(0 * logps + 1, batch)


def observe(policy: Policy, data: Dataset, *, rows: int, edits: Edits | None = None, pool: Pool = "mean") -> Observed:
    """One pass over the data under the edits, which have one row for all responses; in response order."""
    means, logps, ids = [], [], []
    for batch in once(data, rows=rows, even=shared(policy.mesh)):
        taps, sums, counts = _observed(policy.replace(remat="none", edits=edits), batch, pool)
        filled = batch.ids >= 0
        means.append(np.asarray(taps).transpose(1, 2, 0, 3)[filled])
        logps.append((np.asarray(sums) / np.maximum(np.asarray(counts), 1))[filled])
        ids.append(batch.ids[filled])
    order = np.argsort(np.concatenate(ids))
    return Observed(np.concatenate(means)[order], np.concatenate(logps)[order].astype(np.float64))


def blind_reader(
    activations: Activations,
    positive: Bool[np.ndarray, "N"],
    direction: Float[np.ndarray, "D"],
    layer: int,
    *,
    strength: float = 100.0,
) -> Readout:
    """A logistic probe at a later layer that cannot see the direction itself: w . v = 0.

    The residual stream carries a push on to every later layer, so an ordinary probe there would read the push and not
    what the model made of it. The direction is projected out of the features and of the weights; what this reader sees
    move was moved by the blocks between. Fit it on other prompts than the direction's and the ones it will read.
    """
    (unit,) = units(np.asarray(direction, np.float64)[None])
    x = activations.means[:, layer].astype(np.float64)
    x = x - np.outer(x @ unit, unit)
    labels, ones = positive[:, None].astype(int), np.ones((len(x), 1))
    w, b = fit_linear(x, labels, ones, method="logistic", strength=strength)
    w = w[:, 0] - (w[:, 0] @ unit) * unit
    return Readout(layer, w, float(b[0]))


def log_odds(logps: np.ndarray, positive: np.ndarray, prompts: np.ndarray) -> Float[np.ndarray, "G"]:
    """Mean ln p per token of a prompt's positive responses minus that of its negative ones, nats, per prompt."""
    return per_prompt(logps, positive, prompts) - per_prompt(logps, ~positive, prompts)


def per_prompt(
    values: Float[np.ndarray, "N"], chosen: Bool[np.ndarray, "N"], prompts: Int[np.ndarray, "N"]
) -> np.ndarray:
    """Mean of the chosen responses' values, per prompt in the order of their numbers.

    Raises:
      BadInput: a prompt has no chosen response.
    """
    _, prompt = np.unique(prompts, return_inverse=True)
    counts = np.bincount(prompt, weights=chosen.astype(float))
    if not counts.all():
        raise BadInput("direction: a prompt has responses of one class only; leave it out or add an answer to it")
    return np.bincount(prompt, weights=np.where(chosen, values, 0.0)) / counts


def comparable(data: Dataset, positive: Bool[np.ndarray, "N"]) -> tuple[Dataset, Bool[np.ndarray, "N"]]:
    """The prompts with responses of both classes, and which responses of the data those have.

    Raises:
      BadInput: there is none.
    """
    on = mixed(data.prompts, positive)
    if not on.any():
        raise BadInput("direction: no prompt has responses of both classes; log-odds need some that do")
    number = np.unique(data.prompts, return_inverse=True)[1]
    return data.only(np.unique(number[on]).tolist()), on


def mixed(prompts: Int[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Responses to prompts that have responses of both classes."""
    number = np.unique(prompts, return_inverse=True)[1]
    share = np.bincount(number, weights=positive.astype(float)) / np.bincount(number)
    return ((share > 0) & (share < 1))[number]


def thirds(prompts: Int[np.ndarray, "N"], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three sets of responses that share no prompt: to fit the direction, to fit its reader, to test on.

    Raises:
      BadInput: fewer than two prompts a set.
    """
    names, number = np.unique(prompts, return_inverse=True)
    if len(names) < 6:
        raise BadInput(f"direction: {len(names)} prompts cannot be split in three; give 6 or more")
    part = np.random.default_rng([seed, 3]).permutation(np.arange(len(names)) % 3)[number]
    return part == 0, part == 1, part == 2
