"""Plans: counting operations and collectives against closed forms, and a step that is never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from aif.config import check
from aif.errors import BadInput
from aif.hlo import collectives, flops
from aif.models.hub import load, sizes
from aif.models.published import PUBLISHED
from aif.plan import plan

CONFIG = {
    "model": {"source": "tiny-random", "remat": "none"},
    "corpus": {"path": "bundled:tiny"},
    "batch": {"rows": 2, "length": 384},
    "adapter": {"rank": 4, "alpha": 8},
    "arms": {"only": {"objective": {"name": "sft"}, "steps": 2}},
}

HLO = """
HloModule m, num_partitions=8

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = f32[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %ar = (f32[2]{0}, bf16[6]{0}) all-reduce(%y, %z), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %a2a = f32[10]{0} all-to-all(%a), replica_groups={}
  %cp = f32[10]{0} collective-permute(%a), source_target_pairs={{0,1}}
}
"""


def test_collectives_count_loops_in_full():
    """Ring of n: an all-gather sends (n - 1)/n of its result, an all-reduce twice that, a permutation all of it."""
    found = collectives(HLO)
    assert found["all-gather"] == (5, 5 * 128, 5 * 128 * 3 / 4)
    assert found["all-reduce"] == (5, 5 * 20, 5 * 20)
    assert found["collective-permute"] == (1, 40, 40)
    assert found["all-to-all"] == (1, 40, 40 * 7 / 8)  # among all devices
    assert set(found) == {"all-gather", "all-reduce", "all-to-all", "collective-permute"}


def test_operations_of_products():
    """2 m n k for a product, as often as its loop runs; the gradient of x W in both costs twice as much again."""
    x, w = jnp.ones((3, 5)), jnp.ones((5, 7))
    loop = lambda x: jax.lax.scan(lambda c, _: (c, jax.jit(jnp.matmul)(c, w)), x, None, length=4)[1]  # noqa: E731
    assert flops(jax.make_jaxpr(jnp.matmul)(x, w).jaxpr) == 2 * 3 * 5 * 7
    assert flops(jax.make_jaxpr(loop)(x).jaxpr) == 4 * 2 * 3 * 5 * 7
    graded = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))
    assert flops(jax.make_jaxpr(graded)(x, w).jaxpr) == 3 * 2 * 3 * 5 * 7


SCRIPT = """
import dataclasses, json, sys
from aif.config import check
from aif.plan import plan
config = json.loads(sys.argv[1])
few = {**config["model"], "source": "tiny-random@nf4"}
others = ({"mesh": {"fsdp": 2}}, {"adapter": {"kind": "full"}}, {"model": few})
found = [plan(check({**config, **other})) for other in ({}, *others)]
print(json.dumps([dataclasses.asdict(p) for p in found]))
"""


def test_a_plan_knows_its_arrays():
    """Sizes by hand; on two devices half of what divides, and all-gathers of weights (shapes are no arrays, so this
    runs without the checks of annotations)."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", SCRIPT, json.dumps(CONFIG)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two, full, few = json.loads(done.stdout)
    config, _ = sizes("tiny-random")
    D, L, q, kv, ff = config.width, config.layers, 64, 32, config.ff
    layer = 2 * D * q + 2 * D * kv + 3 * D * ff + 2 * D
    assert one["weights"] == 4 * (config.vocab * D + L * layer + D)
    trained = L * (4 * (4 * D + 2 * q + 2 * kv) + 3 * 4 * (D + ff) + 7)
    assert one["trained"] == 4 * trained and one["optimizer"] == 8 * trained + 4
    assert one["devices"] == 1 and one["collectives"] == {} and 0 < one["activations"]
    assert one["flops"] > 4 * one["tokens"] * L * layer  # 2 N forward and 2 N backward a token, at least
    split, norms = config.vocab * D + L * (layer - 2 * D), (2 * L + 1) * D
    assert two["devices"] == 2 and 2 * split + 4 * norms <= two["weights"] <= 2 * split + 4 * norms + 4 * D
    assert abs(two["flops"] / one["flops"] - 1) < 0.05  # chunks of the head are filled up differently
    assert two["collectives"]["all-gather"][1] > 0
    assert full["trained"] == full["weights"] == one["weights"]  # the reference stays beside what is trained
    stored = sum(x.nbytes for x in jax.tree.leaves(load("tiny-random@nf4").params))
    assert few["weights"] == stored < one["weights"] / 2
    assert all(few[key] == one[key] for key in ("trained", "optimizer", "flops"))


def test_what_cannot_be_planned():
    online = {"objective": {"name": "grpo", "reward": "ratings"}, "steps": 1}
    for arm in ({"objective": {"name": "efe", "online": True, "reader": {"name": "probes"}}, "steps": 1}, online):
        with pytest.raises(BadInput):
            plan(check({**CONFIG, "arms": {"only": arm}}))
    with pytest.raises(BadInput, match="mesh: data 1 x fsdp 2"):
        plan(check({**CONFIG, "mesh": {"fsdp": 2}}))


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(source, parameters):
    from aif.models.decoder import shapes

    assert source in PUBLISHED
    config, _ = sizes(source)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    total = 0
    for shape in jax.tree.leaves(shapes(config), is_leaf=is_shape):
        n = 1
        for side in shape:
            n *= side
        total += n
    assert total == parameters
