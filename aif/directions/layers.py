"""The map over layers: at which layer is a direction functional?

Prompts are split in three: on the first third the direction is made, on the second its reader is fitted, and it is
tried on the last. The reader of layer l stands halfway between l and the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from aif.batches import Dataset
from aif.directions.activations import Activations, response_means
from aif.directions.causal import blind_reader, thirds
from aif.directions.contrast import mean_difference
from aif.directions.functional import DOSES, Functional, Trial, controls, functional
from aif.directions.linear import STRENGTHS, fit_linear
from aif.directions.record import check_layer
from aif.errors import BadInput
from aif.policy import Policy
from aif.slots import Pool

Make = Callable[[Activations, np.ndarray], Float[np.ndarray, "L D"]]


def mean_vectors(activations: Activations, positive: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "L D"]:
    """The mean difference at every layer."""
    return np.asarray(mean_difference(activations, positive).vector)


def logistic_vectors(activations: Activations, positive: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "L D"]:
    """The weights of a logistic probe at every layer."""
    labels, ones = positive[:, None].astype(int), np.ones((len(positive), 1))
    rows = activations.means.transpose(1, 0, 2).astype(np.float64)
    fits = (fit_linear(x, labels, ones, method="logistic", strength=STRENGTHS["logistic"]) for x in rows)
    return np.stack([w[:, 0] for w, _ in fits])


def reader_layer(layer: int, layers: int) -> int:
    """Halfway from a layer to the last one.

    Raises:
      BadInput: there is no later layer.
    """
    if check_layer(layer, layers) == layers - 1:
        raise BadInput(f"direction: layer {layer} has no later layer for a reader; choose from 0..{layers - 2}")
    return layer + (layers - layer) // 2


def part(activations: Activations, chosen: np.ndarray) -> Activations:
    """Some of the responses; the residual norms stay those of all."""
    return activations._replace(means=activations.means[chosen], tokens=activations.tokens[chosen])


def layer_map(
    policy: Policy,
    data: Dataset,
    positive: Bool[np.ndarray, "N"],
    *,
    layers: Sequence[int],
    make: Make = mean_vectors,
    doses: Sequence[float] = DOSES,
    rows: int = 2,
    pool: Pool = "mean",
    count: int = 2,
    seed: int = 0,
    activations: Activations | None = None,
) -> list[Functional]:
    """The verdict at each of the layers, on prompts that neither direction nor reader was made from.

    Args:
      make: activations and labels -> a vector per layer.
      count: random directions a layer.
      activations: those of the data under the policy, pooled the same way, when they are at hand.

    Raises:
      BadInput: a layer is the last one or does not exist, or prompts are too few.
    """
    L = policy.config.layers
    readers = [reader_layer(layer, L) for layer in layers]
    prompts = data.prompts
    first, second, third = thirds(prompts, seed)
    seen = response_means(policy, data, rows=rows, pool=pool) if activations is None else activations
    vectors = make(part(seen, first), positive[first])
    example = np.unique(prompts, return_inverse=True)[1]
    trial = Trial(policy, data.only(np.unique(example[third]).tolist()), positive[third], seen.norms, rows, pool)
    base = trial.seen()
    found = []
    for layer, later in zip(layers, readers, strict=True):
        reader = blind_reader(part(seen, second), positive[second], vectors[layer], later)
        random = controls(trial, layer, ends=(doses[0], doses[-1]), count=count, seed=seed)
        found.append(functional(trial, vectors[layer], layer, reader, doses=doses, base=base, random=random))
    return found
