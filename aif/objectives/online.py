"""What objectives on the policy's own samples are made of: baselines, clipped ratios, divergence from the habit.

All of it works on scored tokens `[B, N]` and response slots `[B, R]` of a batch of rollouts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from aif.models.decoder import Head
from aif.objectives.logprobs import Chunks, Cut, same_group, vocabulary_kl
from aif.policy import Policy
from aif.types import Batch, Scalar


def leave_one_out(values: Float[Array, "B R"], batch: Batch) -> Float[Array, "B R"]:
    """v_k - mean of the siblings' values: unbiased baseline (Kool et al. 2019); 0 for an only child."""
    same = same_group(batch).astype(values.dtype)
    others = jnp.sum(same, axis=-1) - 1
    total = jnp.einsum("brs,bs->br", same, values)
    return jnp.where(others > 0, values - (total - values) / jnp.maximum(others, 1), 0.0)


def clipped(
    ratio: Float[Array, "*s"], advantage: Float[Array, "*s"], *, low: Scalar, high: Scalar
) -> Float[Array, "*s"]:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), maximised (Schulman et al. 2017, eq. 7; separate bounds)."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def k1(policy: Policy, hidden: Array, logps: Float[Array, "B N"], batch: Batch) -> Float[Array, "B N"]:
    """ln pi - ln E of the sampled token: unbiased; its own gradient has mean zero and is left out."""
    return jax.lax.stop_gradient(logps) - batch.extras["reference_token_logps"]


def k3(policy: Policy, hidden: Array, logps: Float[Array, "B N"], batch: Batch) -> Float[Array, "B N"]:
    """E/pi - 1 - ln(E/pi) of the sampled token: unbiased, never negative, less variance."""
    difference = batch.extras["reference_token_logps"] - logps
    return jnp.exp(difference) - 1 - difference


def exact(policy: Policy, hidden: Array, logps: Float[Array, "B N"], batch: Batch) -> Float[Array, "B N"]:
    """KL(pi(. | y_<t, x) || E(. | y_<t, x)) over the whole vocabulary; the head is frozen and shared with the habit."""
    picked = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    there = batch.weights > 0
    return divergence(picked, batch.extras["reference_hidden"], policy.head, policy.head, asked=there)


AT_A_TIME = 256  # positions that are asked for or left out together

KL = {"k1": k1, "k3": k3, "exact": exact}


def divergence(
    p: Float[Array, "B N D"],
    q: Float[Array, "B N D"],
    head_p: Head,
    head_q: Head,
    *,
    asked: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N"]:
    """KL(softmax(head_p(p)) || softmax(head_q(q))) per position, nats; `[B, N, V]` never exists.

    Chunks of positions of which none is `asked` for cost nothing and give 0.
    """
    at_a_time = AT_A_TIME * head_p.shared
    chunks, cut = Chunks.of(p.shape[:2], at_a_time), Cut.of(head_p, at_a_time)
    asked = jnp.ones(p.shape[:2], bool) if asked is None else asked
    wanted = chunks.split(asked).any(axis=1)

    one = lambda pair: vocabulary_kl(pair[0], head_p, pair[1][None], head_q, cut.tile)[0]  # noqa: E731
    nothing = lambda pair: jnp.zeros(len(pair[0]))  # noqa: E731
    pairs = (chunks.split(p), chunks.split(q))
    return chunks.joined(jax.lax.map(lambda x: jax.lax.cond(x[0], one, nothing, x[1]), (wanted, pairs)))


def per_token(values: Float[Array, "B R"], batch: Batch) -> Float[Array, "B N"]:
    """Each response's value at its tokens; 0 at padding."""
    return jnp.where(batch.weights > 0, jnp.take_along_axis(values, batch.response, axis=1), 0.0)
