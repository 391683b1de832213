"""A model bound to its values: what objectives, metrics and readers are handed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aif.models.decoder import DecoderConfig, Head, forward, head
from aif.sharding import by_rows, rows, shared, vocabulary
from aif.steering import within
from aif.types import Adapter, Batch, Edits, Output, Params, Reach, Tap

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Policy:
    """Parameters, an optional adapter and optional edits behind one call.

    A pytree, so that it can be an argument of a jitted function: changing its values compiles nothing again. The
    reference model is the same policy with `adapter=None`; no weight is ever held twice. The edits act on the tokens
    that `reach` names (`aif.steering.reach`), or on all. On a `mesh`, rows are shared among its devices.
    """

    params: Params
    adapter: Adapter | None = None
    edits: Edits | None = None
    reach: Reach | None = None
    config: DecoderConfig = field(metadata=STATIC, kw_only=True)
    remat: str = field(default="none", metadata=STATIC, kw_only=True)
    compute_dtype: Any = field(default=jnp.float32, metadata=STATIC, kw_only=True)
    mesh: Mesh | None = field(default=None, metadata=STATIC, kw_only=True)

    def __call__(self, batch: Batch, *, tap: Tap | None = None) -> Output:
        """The forward pass over packed rows."""
        batch = by_rows(batch._replace(beside=None), self.mesh)
        edits = self.edits
        if edits is not None and self.reach is not None:
            edits = within(edits, batch, self.reach)
        return forward(
            self.config,
            self.gathered.params,
            batch.tokens,
            positions=batch.positions,
            segments=batch.segments,
            branches=batch.branches,
            adapter=self.adapter,
            edits=edits,
            tap=tap,
            remat=self.remat,
            compute_dtype=self.compute_dtype,
            rows=rows(self.mesh),
        )

    @property
    def gathered(self) -> Policy:
        """The same policy, on a mesh with what is read many times in a program gathered once."""
        return self if self.mesh is None else self.replace(params=vocabulary(self.params, self.mesh))

    @property
    def head(self) -> Head:
        """The vocabulary head: a call turns hidden states into logits; `weight` is `[V, D]`."""
        whole = self.mesh is not None and self.mesh.shape["tensor"] > 1
        return Head(head(self.gathered.params), self.config.logit_cap, shared(self.mesh), whole)

    def replace(self, **values: Any) -> Policy:
        """The same policy with other values."""
        return replace(self, **values)


def bind(lm: Any, adapter: Adapter | None = None, edits: Edits | None = None, **options: Any) -> Policy:
    """A policy from a loaded model and, optionally, an adapter and edits."""
    return Policy(lm.params, adapter, edits, config=lm.config, **options)
