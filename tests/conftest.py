"""Shape annotations are checked while tests run (jaxtyping with beartype), and fixtures that several files share."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# NamedTuples (Batch, Edits, ...) are not checked by the hook; the functions that take their fields are.
CHECKED = [
    "aif.adapter",
    "aif.basins",
    "aif.directions",
    "aif.drawing",
    "aif.free_energy",
    "aif.models.decoder",
    "aif.models.layers",
    "aif.objectives",
    "aif.policy",
    "aif.readers",
    "aif.sampling",
    "aif.steering",
]
install_import_hook(CHECKED, "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

TOY_SEED = 3


def loud(params: dict, seed: int = TOY_SEED) -> dict:
    """Weights ten times the usual size and uneven norms and biases, so that every part of the model shows."""

    def fresh(path: tuple, x: jax.Array) -> jax.Array:
        name = path[-1].key
        key = jax.random.fold_in(jax.random.key(seed), hash_of(path))
        noise = jax.random.normal(key, x.shape)
        return 1 + 0.3 * noise if name.endswith("norm") else (0.5 if name == "b" else 0.2) * noise

    def hash_of(path: tuple) -> int:
        return sum(ord(c) * (n + 1) for n, c in enumerate(jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(fresh, params)


@pytest.fixture(scope="session")
def toy():
    """A policy of three small layers: grouped heads, biases, an untied head, llama3 rope scaling."""
    from aif.models.decoder import DecoderConfig
    from aif.models.module import random_params
    from aif.policy import Policy

    config = DecoderConfig(
        family="toy",
        vocab=37,
        width=16,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=6,
        ff=24,
        rope_scaling=("llama3", 8.0, 1.0, 4.0, 32),
        tied=False,
        qkv_bias=True,
    )
    return Policy(loud(random_params(config)), config=config)


@pytest.fixture(scope="session")
def toy_adapter(toy):
    """A rank-2 adapter of the toy model whose B is not zero."""
    from aif.adapter import lora

    return awake(lora(toy.config, rank=2, alpha=4.0, key=jax.random.key(1)), jax.random.key(2))


def awake(adapter: dict, key: jax.Array, size: float = 0.1) -> dict:
    """The adapter with Gaussian B (or u)."""
    out = {}
    for number, (name, target) in enumerate(adapter.items()):
        last = "u" if "u" in target else "b"
        noise = jax.random.normal(jax.random.fold_in(key, number), target[last].shape)
        out[name] = {**target, last: size * noise}
    return out


@pytest.fixture(scope="session")
def lm():
    """The random model that reads bytes, with loud weights."""
    from dataclasses import replace

    import aif

    model = aif.load("tiny-random")
    return replace(model, params=loud(model.params))


@pytest.fixture(scope="session")
def base(lm):
    """Its policy without an adapter."""
    from aif.policy import bind

    return bind(lm)


@pytest.fixture(scope="session")
def adapter(lm):
    """A rank-2 adapter of it whose B is not zero."""
    from aif.adapter import lora

    return awake(lora(lm.config, rank=2, alpha=4.0, key=jax.random.key(5)), jax.random.key(6))


@pytest.fixture(scope="session")
def rows():
    """The eight prompts of the bundled tiny corpus, four answers each."""
    from aif.corpus import bundled, read

    return read(bundled("tiny")).rows


@pytest.fixture
def call(capsys, monkeypatch):
    """`aif ...` in this process: its exit status and what it wrote to stdout and stderr."""
    import aif.cli

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aif", *map(str, words)])
        capsys.readouterr()
        try:
            aif.cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(call):
    """That `aif ...` ends with status 2 and this one line, and prints nothing else."""

    def check(*words, line: str):
        status, out, err = call(*words)
        assert (status, out) == (2, ""), err
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert line in err and "Traceback" not in err

    return check
