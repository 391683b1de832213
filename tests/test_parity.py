"""Logits and residuals of the tiny models agree with transformers' torch implementation (`golden/make_logits.py`)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.models.decoder import forward, logits
from aif.models.weights import read_folder

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2"])
def test_tiny_models_agree_with_transformers(name):
    """tiny_llama: untied, llama3 rope scaling; tiny_qwen2: tied, biases. Every block's residual and the logits."""
    golden = np.load(GOLDEN / f"{name}.npz")
    config, params = read_folder(GOLDEN / name)
    params = jax.tree.map(jnp.asarray, params)
    output = forward(config, params, jnp.asarray(golden["tokens"]), tap=lambda h: h)
    np.testing.assert_allclose(logits(params, output.hidden), golden["logits"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(output.taps, golden["hidden"], rtol=0, atol=2e-4)
