"""Training: one jitted step for every objective, and the loop around it.

The step takes the loss as a `jax.tree_util.Partial` whose hyperparameters are array leaves, and the learning rate,
decay and clipping as arrays, so changing any value compiles nothing again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

#BATCHES
from aif.errors import BadInput
from aif.objectives import Objective
from aif.policy import Policy
from aif.types import Batch, Loss, Mean, State

MAX_SKIPPED = 5  # consecutive non-finite steps after which a run stops


@dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up, then cosine or linear decay to `final * learning_rate`.

    `clip` bounds the global gradient norm (0 leaves it alone). Decay applies to matrices, never to norms and biases.
    """

    learning_rate: float = 1e-3
    warmup: int = 0
    schedule: str = "cosine"
    final: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of 0-based `step` out of `steps`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, steps - self.warmup)
        left = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (self.final + (1 - self.final) * left)

    def values(self, step: int, steps: int) -> dict[str, np.ndarray]:
        """The numbers the jitted step reads, as arrays."""
        numbers = {
            "rate": self.rate(step, steps),
            "decay": self.weight_decay,
            "b1": self.b1,
            "b2": self.b2,
            "eps": self.eps,
            "clip": self.clip or np.inf,
        }
        return {name: np.float32(x) for name, x in numbers.items()}


def _decayed(trainable: Any) -> Any:
    """True for the leaves weight decay applies to."""
    leaf = lambda path, x: path[-1].key in ("a", "b", "u", "w", "embed", "head") and x.ndim > 1 + (path[0].key == "layers")  # noqa: E731
    return jax.tree_util.tree_map_with_path(leaf, trainable)


def transform(values: dict[str, Any]) -> optax.GradientTransformation:
    """Clip, Adam moments, decoupled decay, learning rate: AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    return optax.chain(
        optax.clip_by_global_norm(values["clip"]),
        optax.scale_by_adam(values["b1"], values["b2"], values["eps"]),
        optax.add_decayed_weights(values["decay"], mask=_decayed),
        optax.scale(-values["rate"]),
    )


def start_state(trainable: Any, key: Array) -> State:
    """A fresh training state; the trainable values are copied, so the caller's arrays survive donation."""
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), trainable)
    return State(jnp.int32(0), trainable, transform(Optimizer().values(0, 1)).init(trainable), key)


def attach(base: Policy, trainable: Any, full: bool) -> Policy:
    """The policy that carries the trainable values: as its adapter, or as all of its parameters."""
    return base.replace(params=trainable) if full else base.replace(adapter=trainable)


@partial(jax.jit, donate_argnums=0, static_argnames="full")
def train_step(
    state: State, base: Policy, batches: Batch, loss: Partial, values: dict[str, Array], *, full: bool
) -> tuple[State, dict[str, Mean]]:
    """One update from micro-batches `[A, B, ...]`: exactly the gradient of (sum of losses) / (sum of weights).

    A non-finite loss or gradient leaves trainable values and moments as they were and is counted in `skipped`.
    """

    def total(trainable: Any, batch: Batch) -> tuple[Array, Loss]:
        result = loss(attach(base, trainable, full), batch)
        return result.total.sum, result

    def accumulate(carry: Any, batch: Batch) -> tuple[Any, None]:
        (_, result), gradient = jax.value_and_grad(total, has_aux=True)(state.trainable, batch)
        return jax.tree.map(jnp.add, carry, (gradient, result)), None

    first = jax.tree.map(lambda x: x[0], batches)
    if batches.tokens.shape[0] == 1:
        (_, result), gradient = jax.value_and_grad(total, has_aux=True)(state.trainable, first)
    else:
        shapes = jax.eval_shape(lambda t: jax.value_and_grad(total, has_aux=True)(t, first), state.trainable)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0][1]))
        (gradient, result), _ = jax.lax.scan(accumulate, zeros, batches)
    weight = jnp.where(result.total.weight == 0, 1.0, result.total.weight)
    gradient = jax.tree.map(lambda g: g / weight, gradient)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(result.total.sum)
    updates, moments = transform(values).update(gradient, state.optimizer, state.trainable)
    moved = (optax.apply_updates(state.trainable, updates), moments)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, (state.trainable, state.optimizer))
    one = jnp.float32(1)
    log = {"loss": result.total, **result.terms, "gradient_norm": Mean(norm, one)}
    log["skipped"] = Mean((~finite).astype(jnp.float32), one)
    return State(state.step + 1, *kept, state.key), log
