"""Multinomial logistic regression, many problems over the same features at once.

    minimise  - sum_i w_i ln softmax(z_i B + b)[y_i] + penalty / 2 ||B||_F^2        (b is not penalised)

The features are few enough for all problems (dimensions x members of an ensemble) to share their matrix products.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from aif.types import Scalar

BIAS_PENALTY = 1e-3  # only keeps the bias of a level that never occurs from running away
SETTLED = 1e-6  # no problem's coefficients moved by more than this share of their norm


@partial(jax.jit, static_argnames=("levels", "iterations"))
def fit(
    z: Float[Array, "N r"],
    y: Int[Array, "N P"],
    w: Float[Array, "N P"],
    penalty: Float[Array, "P"] | Scalar,
    *,
    levels: int,
    iterations: int = 600,
) -> tuple[Float[Array, "r P O"], Float[Array, "P O"]]:
    """Coefficients and biases of P problems, under one penalty or one each; a label of -1 is left out.

    Accelerated gradient descent with gradient restarts (O'Donoghue & Candes 2015), each coordinate scaled by a bound on
    its curvature: the columns of z should be orthogonal (principal coordinates), which makes the bound nearly tight.
    Ends when every problem has settled, after `iterations` at most.
    """
    target = jax.nn.one_hot(y, levels)  # zero where unlabelled
    w = jnp.where(y >= 0, w, 0.0)
    penalty = jnp.broadcast_to(penalty, y.shape[1])[:, None]
    heavy = 0.5 * jnp.max(w, axis=0)  # the softmax's curvature is at most 1/2
    step = 1 / (heavy[None, :, None] * jnp.sum(jnp.square(z), axis=0)[:, None, None] + penalty)
    bias_step = 1 / (0.5 * jnp.sum(w, axis=0)[:, None] + BIAS_PENALTY)

    def gradient(B: Array, b: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(jnp.einsum("nr,rpo->npo", z, B) + b, axis=-1)
        error = w[..., None] * (p - target)
        return jnp.einsum("nr,npo->rpo", z, error) + penalty * B, error.sum(axis=0) + BIAS_PENALTY * b

    def going(carry: tuple) -> Array:
        return (carry[-1] > SETTLED) & (carry[-2] < iterations)

    def once(carry: tuple) -> tuple:
        (B, b), (B_ahead, b_ahead), t, i, _ = carry
        dB, db = gradient(B_ahead, b_ahead)
        B_new, b_new = B_ahead - step * dB, b_ahead - bias_step * db
        uphill = jnp.einsum("rpo,rpo->p", dB, B_new - B) + jnp.einsum("po,po->p", db, b_new - b) > 0
        t = jnp.where(uphill, 1.0, t)
        t_new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        push = jnp.where(uphill, 0.0, (t - 1) / t_new)[:, None]
        ahead = (B_new + push * (B_new - B), b_new + push * (b_new - b))
        return (B_new, b_new), ahead, t_new, i + 1, moved((B_new, b_new), (B, b))

    P = y.shape[1]
    zero = (jnp.zeros((z.shape[1], P, levels)), jnp.zeros((P, levels)))
    found, *_ = jax.lax.while_loop(going, once, (zero, zero, jnp.ones(P), 0, jnp.float32(jnp.inf)))
    return found


def moved(new: tuple[Array, Array], old: tuple[Array, Array]) -> Scalar:
    """The largest relative change of any problem's coefficients and biases."""

    def squared(B: Array, b: Array) -> Float[Array, "P"]:
        return jnp.square(B).sum(axis=(0, 2)) + jnp.square(b).sum(axis=1)

    change = squared(new[0] - old[0], new[1] - old[1])
    return jnp.sqrt(jnp.max(change / jnp.maximum(squared(*new), 1e-12)))
