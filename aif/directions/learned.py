"""Directions that training found: a trained vector, what a rank-1 adapter writes, and the shift that tuning makes.

They are named apart because published work finds them nearly orthogonal to one another and to contrasts (cosine 0.04
between a rank-1 B and the mean difference at its layer, Turner, Soligo et al. 2025).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from aif.directions.activations import Activations
from aif.errors import BadInput
from aif.types import Adapter, Direction

WRITERS = ("o", "down")  # the linear layers that write to the residual stream


def trained_vector(adapter: Adapter, *, provenance: dict[str, Any] | None = None) -> Direction:
    """v_l = scale_l u_l of a `vector` adapter, whatever objective trained it; zero in layers it leaves alone.

    `layers` in the provenance lists the trained ones, and `layer` is the one with the longest vector.

    Raises:
      BadInput: the adapter holds no vector, or one that was never trained (all zero) or is not finite.
    """
    if "vector" not in adapter:
        raise BadInput(
            f"adapter: holds {', '.join(adapter) or 'nothing'} and no vector; train with adapter.kind=vector"
        )
    target = adapter["vector"]
    vector = np.asarray(target["scale"])[:, None] * np.asarray(target["u"])
    about = {"method": "trained vector", "sign": "as trained: added, it lowers the loss"}
    return _kept(vector, "trained", {**about, **(provenance or {})})


def written(
    adapter: Adapter, target: str, *, toward: Direction | None = None, provenance: dict[str, Any] | None = None
) -> Direction:
    """v_l = scale_l B_l of a rank-1 adapter of `o` or `down`, which writes (x . A_l) v_l to the residual stream.

    A B is the same with both signs turned, so B alone has none; with `toward` it takes the sign of its cosine to that
    direction.

    Raises:
      BadInput: the target does not write to the residual stream, is not in the adapter, has a rank above 1, or is zero.
    """
    if target not in WRITERS:
        raise BadInput(f"adapter: {target!r} does not write to the residual stream; take {' or '.join(WRITERS)}")
    if target not in adapter:
        raise BadInput(
            f"adapter: holds {', '.join(adapter) or 'nothing'} and not {target!r}; train it with that target"
        )
    b = np.asarray(adapter[target]["b"])
    if b.shape[1] != 1:
        raise BadInput(
            f"adapter: {target} has rank {b.shape[1]}, and only a rank-1 B is one direction; train with adapter.rank=1"
        )
    vector = np.asarray(adapter[target]["scale"])[:, None] * b[:, 0]
    sign = "none: A and B may both be turned"
    if toward is not None:
        way = np.sign(np.einsum("ld,ld->l", vector, np.asarray(toward.vector)))
        vector, sign = vector * np.where(way == 0, 1.0, way)[:, None], f"along the {toward.kind} direction"
    about = {"method": f"rank-1 B of {target}", "sign": sign}
    return _kept(vector, "adapter", {**about, **(provenance or {})})


def mean_shift(base: Activations, tuned: Activations, *, provenance: dict[str, Any] | None = None) -> Direction:
    """v_l = mean(tuned) - mean(base) over the same responses: what tuning does to the residual of the same text.

    Raises:
      BadInput: the two are not of the same texts, or an activation is not finite.
    """
    if base.means.shape != tuned.means.shape or not np.array_equal(base.tokens, tuned.tokens):
        raise BadInput("direction: the base and the tuned model read different texts; read the same data with both")
    if not (np.isfinite(base.means).all() and np.isfinite(tuned.means).all()):
        raise BadInput("direction: an activation is not finite; check the adapter and the compute dtype")
    vector = (tuned.means.astype(np.float64) - base.means).mean(axis=0)
    about = {"method": "mean shift", "sign": "tuned minus base", "norms": base.norms.tolist()}
    return _kept(vector, "adapter", {**about, **(provenance or {})})


def _kept(vector: np.ndarray, kind: str, about: dict[str, Any]) -> Direction:
    size = np.linalg.norm(vector, axis=1)
    if not np.isfinite(size).all():
        raise BadInput("direction: the adapter's values are not finite; train it again")
    if not size.any():
        raise BadInput("direction: it is zero at every layer; train the adapter first")
    about = {"norm_unit": "raw", "layers": np.flatnonzero(size).tolist(), "layer": int(size.argmax()), **about}
    return Direction(jnp.asarray(vector, jnp.float32), kind, about)
