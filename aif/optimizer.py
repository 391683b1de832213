"""AdamW with a schedule, as a transformation whose every number is an array."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax import Array


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
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        left = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (self.final + (1 - self.final) * left)

    def values(self, step: int, steps: int) -> dict[str, np.floating]:
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
    matrices = ("a", "b", "u", "w", "embed", "head")

    def decayed(path: tuple[Any, ...], x: Array) -> bool:
        return path[-1].key in matrices and x.ndim > 1 + (path[0].key == "layers")

    return jax.tree_util.tree_map_with_path(decayed, trainable)


def transform(values: dict[str, Any]) -> optax.GradientTransformation:
    """Clip, Adam moments, decoupled decay, learning rate: AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    return optax.chain(
        optax.clip_by_global_norm(values["clip"]),
        optax.scale_by_adam(values["b1"], values["b2"], values["eps"]),
        optax.add_decayed_weights(values["decay"], mask=_decayed),
        optax.scale(-values["rate"]),
    )
