"""The decoder as an NNX module, and fresh parameters; apart from the forward pass, which needs no flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from aif.types import Output, Params

from .decoder import DecoderConfig, forward, shapes


class Decoder(nnx.Module):
    """The model as an NNX module, for users who live in NNX; its state is the nested dict that `forward` reads.

    Fresh weights are normal with standard deviation 0.02, norms start at one and biases at zero.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def start(path: tuple, shape: tuple) -> nnx.Param:
            name = path[-1].key
            if name.endswith("norm"):
                return nnx.Param(jnp.ones(shape))
            return nnx.Param(jnp.zeros(shape) if name == "b" else 0.02 * jax.random.normal(rngs.params(), shape))

        tree = jax.tree_util.tree_map_with_path(start, shapes(config), is_leaf=lambda x: isinstance(x, tuple))
        self.config = config
        self.params = _as_nnx(tree)

    def __call__(self, tokens: Int[Array, "B T"], **values: Any) -> Output:
        return forward(self.config, self.pure_params(), tokens, **values)

    def pure_params(self) -> Params:
        """The nested dict of arrays behind the module."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))["params"]


def _as_nnx(tree: Any) -> Any:
    return nnx.Dict({k: _as_nnx(v) for k, v in tree.items()}) if isinstance(tree, dict) else tree


def random_params(config: DecoderConfig, seed: int = 0) -> Params:
    """Fresh parameters of a model that has never been trained."""
    return Decoder(config, rngs=nnx.Rngs(seed)).pure_params()
