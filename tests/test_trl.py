"""Losses and their gradients agree with TRL's own trainers on the same numbers (`golden/make_losses.py`)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.objectives.dpo import dpo
from aif.objectives.grpo import averages, group_relative, surrogate
from aif.objectives.online import per_token
from aif.rewards.bradley_terry import bradley_terry
from aif.types import Batch

PAIRS, REWARD, GRPO = (np.load(Path(__file__).parent / "golden" / f"trl_{n}.npz") for n in ("dpo", "reward", "grpo"))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# name in the file -> variant, label smoothing
VARIANTS = {
    "sigmoid_b{}": ("sigmoid", 0.0),
    "cdpo_b{}_ls0.1": ("sigmoid", 0.1),
    "hinge_b{}": ("hinge", 0.0),
    "ipo_b{}": ("ipo", 0.0),
}
FREE = {
    "free_sigmoid_b{}": ("sigmoid", 0.0),
    "free_sigmoid_b{}_ls0.1": ("sigmoid", 0.1),
    "free_hinge_b{}": ("hinge", 0.0),
    "free_ipo_b{}": ("ipo", 0.0),
}


def agree(golden, name, loss, chosen, rejected):
    """The losses of 16 pairs, two of them saturated, and both gradients."""
    np.testing.assert_allclose(loss(chosen, rejected), golden[f"loss__{name}"], **CLOSE)
    slopes = jax.grad(lambda *x: loss(*x).sum(), argnums=(0, 1))(chosen, rejected)
    for side, slope in zip(("chosen", "rejected"), slopes, strict=True):
        np.testing.assert_allclose(slope, golden[f"grad_{side}__{name}"], **CLOSE)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_dpo_is_trls(name, beta):
    """IPO's log-ratios are means over tokens."""
    variant, smoothing = VARIANTS[name]
    lengths = [jnp.asarray(PAIRS[f"tokens_{s}"] if variant == "ipo" else np.ones(16)) for s in ("chosen", "rejected")]
    references = [jnp.asarray(PAIRS[f"ref_{s}"]) / n for s, n in zip(("chosen", "rejected"), lengths, strict=True)]

    def loss(chosen, rejected):
        means = (chosen / lengths[0], rejected / lengths[1])
        return dpo(*means, *references, beta=beta, label_smoothing=smoothing, variant=variant)

    agree(PAIRS, name.format(beta), loss, *(jnp.asarray(PAIRS[f"policy_{s}"]) for s in ("chosen", "rejected")))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", FREE)
def test_dpo_without_a_reference_is_trls_cpo(name, beta):
    variant, smoothing = FREE[name]
    nothing = jnp.zeros(16)
    loss = lambda c, r: dpo(c, r, nothing, nothing, beta=beta, label_smoothing=smoothing, variant=variant)  # noqa: E731
    agree(PAIRS, name.format(beta), loss, *(jnp.asarray(PAIRS[f"policy_{s}"]) for s in ("chosen", "rejected")))


@pytest.mark.parametrize("name", ["plain", "margin", "centre"])
def test_the_reward_models_loss_is_trls(name):
    options = {"margin": 0.0 if name == "plain" else jnp.asarray(REWARD["margin"])}
    options["centre"] = 0.01 if name == "centre" else 0.0
    loss = lambda c, r: bradley_terry(c, r, **options)  # noqa: E731
    agree(REWARD, name, loss, jnp.asarray(REWARD["chosen"]), jnp.asarray(REWARD["rejected"]))


# Group-relative policy optimisation: 3 prompts of 4 samples of up to 6 tokens, one sample without any


def samples() -> Batch:
    """A row per prompt; the scored tokens of a row are its samples' tokens, padding included with weight 0."""
    rows = lambda x: jnp.asarray(x).reshape(3, 24)  # noqa: E731
    blank = jnp.zeros((3, 24), int)
    response = jnp.broadcast_to(jnp.repeat(jnp.arange(4), 6), (3, 24))
    ids = jnp.arange(12).reshape(3, 4)
    return Batch(
        blank, blank, blank, blank, blank, blank, rows(GRPO["mask"]).astype(jnp.float32), response, ids * 0, ids, {}
    )


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_trls(scale):
    """The last group's rewards are equal: its advantages are exactly 0."""
    got = group_relative(jnp.asarray(GRPO["rewards"]).reshape(3, 4), samples(), normalise=float(scale == "group"))
    np.testing.assert_allclose(got.ravel(), GRPO[f"advantages__{scale}"], **CLOSE)
    assert (np.asarray(got)[2] == 0).all()


@pytest.mark.parametrize("name", ["b0.0", "b0.04", "b0.04_corrected"])
@pytest.mark.parametrize("number,average", enumerate(["grpo", "bnpo", "dr_grpo"]))
def test_the_policy_loss_is_trls(number, average, name):
    """Clipped ratios with bounds 0.2 and 0.28, k3 divergence, the three averages; a sample without tokens is safe."""
    how = {"beta": 0.0 if name == "b0.0" else 0.04, "unbiased": float(name.endswith("corrected"))}
    batch, rows = samples(), lambda x: jnp.asarray(x).reshape(3, 24)
    advantages = per_token(jnp.asarray(GRPO["advantages__group"]).reshape(3, 4), batch)

    def loss(logps):
        difference = rows(GRPO["ref_logps"]) - logps
        k3 = jnp.exp(difference) - 1 - difference
        tokens = surrogate(logps, rows(GRPO["old_logps"]), advantages, k3, low=0.2, high=0.28, **how)
        return averages(tokens, batch, 6.0)[number].value

    value, slope = jax.value_and_grad(loss)(rows(GRPO["logps"]))
    np.testing.assert_allclose(value, GRPO[f"loss__{average}_{name}"], **CLOSE)
    np.testing.assert_allclose(slope.reshape(12, 6), GRPO[f"grad__{average}_{name}"], **CLOSE)
