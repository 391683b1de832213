"""The words that every file of the engine uses.

Shapes use one alphabet: B rows, T tokens of a row, N scored tokens of a row, R responses of a row, D residual width,
L layers, V vocabulary, K directions or candidates, S dimensions of a rating scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Bool, Float, Int

from aif.errors import BadInput

Params = dict[str, Any]  # nested dict of arrays; every leaf under "layers" is stacked [L, ...]
Adapter = dict[str, dict[str, Array]]  # target name -> {"a", "b", "scale"}, {"u", "scale"} or {"d"}, leaves [L, ...]
Scalar = Float[Array, ""] | float  # a hyperparameter: a number when it is given, an array inside the jitted step
Tap = Callable[[Array], Any]  # residual [B, T, D] after a block -> what to return, stacked over L


def as_partial(function: Any) -> Any:
    """A function as a pytree: its bound values are array leaves, so changing them compiles nothing. None stays."""
    from jax.tree_util import Partial

    return function if function is None or isinstance(function, Partial) else Partial(function)


class Batch(NamedTuple):
    """Packed rows of prompts with their responses.

    A row holds several *segments* (one prompt each, numbered from 1; 0 is padding). Within a segment, *branch* 0 is the
    prompt and branch k >= 1 is its k-th response, which sees the prompt and itself but no sibling. The scored tokens
    of a row are listed apart: hidden state `index[n]` predicts `targets[n]`, with weight `weights[n]` (0 is padding),
    on behalf of response slot `response[n]`. `extras` holds facts per response slot, `[B, R, ...]`. `beside` is a batch
    of rows of another kind, where an objective asks for one (`aif.objectives.Beside`).
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    branches: Int[Array, "B T"]
    index: Int[Array, "B N"]
    targets: Int[Array, "B N"]
    weights: Float[Array, "B N"]
    response: Int[Array, "B N"]
    group: Int[Array, "B R"]  # the prompt a response answers, as a slot number of the row; -1 marks an empty slot
    ids: Int[Array, "B R"]  # number of the response in the data set; -1 marks an empty slot
    extras: dict[str, Array]
    beside: Any = None


class Output(NamedTuple):
    """Result of a forward pass: the normed final residual `[B, T, D]`, the tap's values stacked over L, the cache."""

    hidden: Float[Array, "B T D"]
    taps: Any = None
    cache: Any = None


class Edits(NamedTuple):
    """Steering of the residual stream h at each block's output, all K directions at once:

        h <- h + mask * sum_k [ add_k + gain_k * (target_k - h . vhat_k) ] vhat_k

    `add` pushes along a direction (residual norms are not assumed: the unit is the norm of h), `gain = 1, target = 0`
    projects the direction out, `gain = 1, target = c` clamps its coordinate to c. Rows may carry different values.
    """

    vector: Float[Array, "L K D"]  # unit norm
    add: Float[Array, "L B K"]
    gain: Float[Array, "L B K"]
    target: Float[Array, "L B K"]
    mask: Float[Array, "#B #T"]  # 1 where the edit applies; size 1 stands for all


class Reach(NamedTuple):
    """Which tokens edits act on, as numbers, so that naming others compiles nothing again.

    A token counts by its kind, and also where its position lies in a span `[start, end)`, from 0 at the prompt's first.
    """

    kinds: Float[Array, "3"]  # 1 where the edits act on prompt tokens, on the last prompt token, on response tokens
    spans: Int[Array, "J 2"]


class Rows(NamedTuple):
    """What a mesh makes of rows, for model code that names no axis: `keep(x)` is x, lying where its rows lie, and
    `each(f)` runs f(x, *whole) on every device's own rows of x."""

    keep: Callable[[Array], Array]
    each: Callable[[Callable[..., Array]], Callable[..., Array]]


class Mean(NamedTuple):
    """A mean kept as its two parts, so that it stays exact under accumulation, packing and sharding."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def value(self) -> Array:
        """sum / weight, and 0 where nothing was weighed."""
        import jax.numpy as jnp

        return self.sum / jnp.where(self.weight == 0, 1.0, self.weight)


class Loss(NamedTuple):
    """What an objective returns: the number that is minimised, and its terms for the log.

    `total` is a mean, or several means over different things whose values add up (a fit and a penalty, say); the
    weights of several depend on the batch alone.
    """

    total: Mean | tuple[Mean, ...]
    terms: dict[str, Mean]

    @property
    def means(self) -> tuple[Mean, ...]:
        """`total` as a tuple."""
        return (self.total,) if isinstance(self.total, Mean) else self.total


class State(NamedTuple):
    """Everything a training run carries from step to step. `trainable` is an adapter, or the whole parameters."""

    step: Int[Array, ""]
    trainable: Any
    optimizer: Any
    key: Array


@dataclass(frozen=True)
class Solution:
    """What a training run found: the trained adapter (None is the base model) and where it came from."""

    name: str
    adapter: Adapter | None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Direction:
    """A direction per layer of the residual stream, `[L, D]` float32, un-normalised, with its provenance.

    `kind` says which construction it is (contrast, probe, trained, adapter): they are nearly orthogonal to one another
    in published work, so a direction without its kind means nothing.
    """

    vector: Float[Array, "L D"]
    kind: str
    provenance: dict[str, Any] = field(default_factory=dict)


__all__ = [
    "Adapter",
    "BadInput",
    "Batch",
    "Bool",
    "Direction",
    "Edits",
    "Loss",
    "Mean",
    "Output",
    "Params",
    "Reach",
    "Rows",
    "Scalar",
    "Solution",
    "State",
    "Tap",
    "as_partial",
]
