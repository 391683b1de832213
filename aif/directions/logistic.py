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


@partial(jax.jit, static_argnames=("levels", "iterations"))
def fit(
    z: Float[Array, "N r"],
    y: Int[Array, "N P"],
    w: Float[Array, "N P"],
    penalty: Scalar,
    *,
    levels: int,
    iterations: int = 600,
) -> tuple[Float[Array, "r P O"], Float[Array, "P O"]]:
    """Coefficients and biases of P problems; a label of -1 is left out.

    Accelerated gradient descent with gradient restarts (O'Donoghue & Candes 2015), each coordinate scaled by a bound on
    its curvature: the columns of z should be orthogonal (principal coordinates), which makes the bound nearly tight.
    """
    target = jax.nn.one_hot(y, levels)  # zero where unlabelled
    w = jnp.where(y >= 0, w, 0.0)
    heavy = 0.5 * jnp.max(w, axis=0)  # the softmax's curvature is at most 1/2
    step = 1 / (heavy[None, :, None] * jnp.sum(jnp.square(z), axis=0)[:, None, None] + penalty)
    bias_step = 1 / (0.5 * jnp.sum(w, axis=0)[:, None] + BIAS_PENALTY)

    def gradient(B: Array, b: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(jnp.einsum("nr,rpo->npo", z, B) + b, axis=-1)
        error = w[..., None] * (p - target)
        return jnp.einsum("nr,npo->rpo", z, error) + penalty * B, error.sum(axis=0) + BIAS_PENALTY * b

    def once(carry: tuple, _: None) -> tuple:
        (B, b), (B_ahead, b_ahead), t = carry
        dB, db = gradient(B_ahead, b_ahead)
        B_new, b_new = B_ahead - step * dB, b_ahead - bias_step * db
        uphill = jnp.einsum("rpo,rpo->p", dB, B_new - B) + jnp.einsum("po,po->p", db, b_new - b) > 0
        t = jnp.where(uphill, 1.0, t)
        t_new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        push = jnp.where(uphill, 0.0, (t - 1) / t_new)[:, None]
        ahead = (B_new + push * (B_new - B), b_new + push * (b_new - b))
        return ((B_new, b_new), ahead, t_new), None

    P = y.shape[1]
    zero = (jnp.zeros((z.shape[1], P, levels)), jnp.zeros((P, levels)))
    (found, _, _), _ = jax.lax.scan(once, (zero, zero, jnp.ones(P)), None, length=iterations)
    return found
