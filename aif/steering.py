"""Edits of the residual stream: add along a direction, project it out, clamp its coordinate; and for which tokens.

Doses are in residual norms: dose 1 at layer l adds a vector as long as the mean residual there, `norms[l]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from aif.errors import BadInput
from aif.slots import asking, owners
from aif.types import Batch, Edits, Reach

Scope = str | Sequence[int | slice]  # the name of a kind, or positions
KINDS = {"all": (1, 1, 1), "prompt": (1, 1, 0), "response": (0, 0, 1), "last": (0, 1, 1)}
END = np.iinfo(np.int32).max


def reach(scope: Scope) -> Reach:
    """Which tokens a scope names: `all`, `prompt`, `response`, `last` (the last prompt token and the response), or
    positions and slices `a:b` counted from the first token of the prompt.

    Raises:
      BadInput: no such scope, or positions that no text has.
    """
    if isinstance(scope, str):
        if scope not in KINDS:
            raise BadInput(f"scope: {scope!r} is none; choose from {', '.join(KINDS)}, or give positions as in 0,5:8")
        return Reach(jnp.array(KINDS[scope], jnp.float32), jnp.zeros((0, 2), jnp.int32))
    spans = []
    for part in scope:
        span = part if isinstance(part, slice) else slice(part, part + 1)
        start, end = span.start or 0, END if span.stop is None else span.stop
        if span.step not in (None, 1) or start < 0 or end <= start:
            raise BadInput(f"scope: {part} names no position; count from 0 at the prompt's first token, as in 0,5:8")
        spans.append((start, end))
    if not spans:
        raise BadInput("scope: no position is named; give some, as in 0,5:8")
    return Reach(jnp.zeros(3), jnp.array(spans, jnp.int32))


def parse_scope(text: str) -> Scope:
    """A scope as the command line writes it: a name, or positions and slices as in `0,5:8,12:`.

    Raises:
      BadInput: it is neither.
    """
    if text in KINDS:
        return text
    try:
        parts = [[int(x) if x else None for x in part.split(":")] for part in text.split(",")]
        if any(len(p) > 2 or (len(p) == 1 and p[0] is None) for p in parts):
            raise ValueError
    except ValueError as error:
        names = ", ".join(KINDS)
        raise BadInput(f"scope: {text!r} is none; choose from {names}, or give positions as in 0,5:8") from error
    return [slice(*p) if len(p) == 2 else p[0] for p in parts]  # pyright: ignore[reportReturnType]


def reached(
    reach: Reach, *, answered: Bool[Array, "B T"], asking: Bool[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """1 on the tokens that the scope names: the one rule for reading a prompt, decoding, scoring and training.

    Args:
      answered: tokens of responses.
      asking: prompt tokens that a response follows.
      positions: counted from 0 at the prompt's first token.
    """
    prompt, last, response = reach.kinds
    kind = jnp.where(answered, response, jnp.where(asking, last, prompt))
    start, end = reach.spans[:, 0], reach.spans[:, 1]
    inside = jnp.any((positions[..., None] >= start) & (positions[..., None] < end), axis=-1)
    return jnp.maximum(kind, inside.astype(jnp.float32))


def within(edits: Edits, batch: Batch, scope: Scope | Reach = "all") -> Edits:
    """The edits on the tokens of a packed batch that `scope` names; never on padding."""
    chosen = scope if isinstance(scope, Reach) else reach(scope)
    real = (jnp.asarray(batch.segments) > 0).astype(jnp.float32)
    answered = owners(batch) < batch.ids.shape[1]
    facts = {"answered": answered, "asking": asking(batch), "positions": jnp.asarray(batch.positions)}
    return edits._replace(mask=edits.mask * real * reached(chosen, **facts))


def _parts(direction: Float[Array, "L D"], layers: Sequence[int], rows: int) -> tuple[Array, Array]:
    """(unit vectors [L, 1, D], which layers [L, B, 1])."""
    L = direction.shape[0]
    wrong = [l for l in layers if not 0 <= l < L]
    if wrong:
        raise BadInput(f"steer: layer {wrong[0]} is out of range; the model has layers 0..{L - 1}")
    length = jnp.linalg.norm(direction, axis=-1, keepdims=True)
    unit = direction / jnp.where(length > 0, length, 1.0)
    on = jnp.zeros((L, rows, 1)).at[jnp.array(layers)].set(1.0)
    return unit[:, None, :], on


def add(
    direction: Float[Array, "L D"], doses: Float[Array, "B"], norms: Float[Array, "L"], *, layers: Sequence[int]
) -> Edits:
    """h <- h + dose_b norms_l vhat_l at the chosen layers; row b has its own dose."""
    unit, on = _parts(direction, layers, len(doses))
    push = on * jnp.asarray(doses)[None, :, None] * norms[:, None, None]
    return Edits(unit, push, jnp.zeros_like(on), jnp.zeros_like(on), jnp.ones((len(doses), 1)))


def clamp(
    direction: Float[Array, "L D"], values: Float[Array, "B"], norms: Float[Array, "L"], *, layers: Sequence[int]
) -> Edits:
    """h <- h + (value_b norms_l - h . vhat_l) vhat_l: the coordinate along the direction is set."""
    unit, on = _parts(direction, layers, len(values))
    goal = on * jnp.asarray(values)[None, :, None] * norms[:, None, None]
    return Edits(unit, jnp.zeros_like(on), on, goal, jnp.ones((len(values), 1)))


def project_out(direction: Float[Array, "L D"], *, rows: int, layers: Sequence[int]) -> Edits:
    """h <- h - (h . vhat_l) vhat_l: ablation of the direction."""
    zeros = jnp.zeros(rows)
    return clamp(direction, zeros, jnp.ones(direction.shape[0]), layers=layers)


def beside_plain(edits: Edits) -> Edits:
    """Two rows: one that is left alone, and one with the edits, which had one row for all."""
    pair = lambda x: jnp.concatenate([jnp.zeros_like(x), x], axis=1)  # noqa: E731
    return Edits(edits.vector, pair(edits.add), pair(edits.gain), pair(edits.target), jnp.ones((2, 1)))


def together(*edits: Edits) -> Edits:
    """Several edits as one, on the same residual: h <- h + the sum of what each would change alone.

    Each has a row for all or one per row of the batch. Pushes add up exactly; directions that are projected out or
    clamped together should be orthogonal.
    """
    rows = max(e.add.shape[1] for e in edits)
    wide = lambda x: jnp.broadcast_to(x, (x.shape[0], rows, x.shape[2]))  # noqa: E731
    every = lambda name: jnp.concatenate([wide(getattr(e, name)) for e in edits], axis=2)  # noqa: E731
    vector = jnp.concatenate([e.vector for e in edits], axis=1)
    return Edits(vector, every("add"), every("gain"), every("target"), jnp.ones((rows, 1)))
