"""Run by test_sharding on eight fake devices: steps, scores and samples on meshes against those of one device."""

from __future__ import annotations

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import aif
from aif.adapter import lora
from aif.batches import build, stream
from aif.corpus import bundled, read
from aif.objectives.logprobs import response_logprobs
from aif.objectives.sft import sft
from aif.policy import bind
from aif.sampling import generate
from aif.sharding import make_mesh, place, place_leaf, shared
from aif.sources import stacked
from aif.steering import add
from aif.train import Optimizer, start_state, train_step
from aif.types import as_partial

SHAPES = {"tiny-random": [(8, 1, 1), (1, 8, 1), (2, 2, 2)]}
SHAPES |= dict.fromkeys(("tiny-random-moe", "tiny-random@nf4"), [(1, 4, 2)])
PROMPTS = [[1 + k, 7, 40 + k] for k in range(8)]
score = jax.jit(response_logprobs)
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **about: compiled.append(event))


def awake(adapter: dict) -> dict:
    return {n: {**t, "b": 0.1 * jax.random.normal(jax.random.key(len(n)), t["b"].shape)} for n, t in adapter.items()}


def found(source: str, mesh, full: bool) -> dict:
    """What a step, scoring and sampling give, as arrays of the host."""
    lm = aif.load(source, put=None if mesh is None else partial(place_leaf, mesh))
    data = build(read(bundled("tiny")).rows, lm.tokenizer, which="pair", length=384, target="discernment")
    batches = stacked([next(stream(data, rows=8, seed=seed)) for seed in (0, 1)])
    direction = jax.random.normal(jax.random.key(3), (lm.config.layers, lm.config.width))
    steer = add(direction, jnp.linspace(-0.5, 0.5, 8), jnp.ones(lm.config.layers), layers=[1])
    base = bind(lm, edits=steer, remat="linear", mesh=mesh)
    trainable = lm.params if full else awake(lora(lm.config, rank=4, alpha=8.0, key=jax.random.key(1)))
    state, loss = place(start_state(trainable, jax.random.key(0)), mesh), as_partial(sft().loss)
    values = Optimizer(clip=0.0).values(5, 10)
    if mesh is not None:  # the weights and their moments really are in parts
        parts = state.optimizer[1].mu["layers"]["up"]["w"] if full else jax.tree.leaves(lm.params["layers"]["up"])[0]
        assert len({str(s.index) for s in parts.addressable_shards}) == mesh.shape["fsdp"] * mesh.shape["tensor"]
    for number in range(1 if full else 2):
        compiled.clear()
        state, log = train_step(state, base, batches, loss, values, full=full)
        assert any("backend_compile" in event for event in compiled) == (number == 0)  # the first step compiles, once
        if number == 0:
            gradient = jax.tree.map(lambda m: np.asarray(m) / np.float32(0.1), state.optimizer[1].mu)
    out = {"log": {name: mean.value for name, mean in log.items()}, "gradient": gradient}
    if not full:
        policy = base.replace(adapter=state.trainable)
        made = generate(policy, PROMPTS, new_tokens=8, stop=258, samples=2, temperature=1.0, key=jax.random.key(2))
        out |= {"trained": state.trainable, "made": made._asdict()}
        out["scores"] = score(policy, jax.tree.map(lambda x: x[0], batches))
    return jax.tree.map(np.asarray, out)


def sorts_its_own(source: str, mesh) -> None:
    """Every device sorts the tokens of its own rows by expert, and no others."""
    lm = aif.load(source, put=partial(place_leaf, mesh))
    data = build(read(bundled("tiny")).rows, lm.tokenizer, which="pair", length=384, target="discernment")
    text = score.lower(bind(lm, mesh=mesh), next(stream(data, rows=8, seed=0))).compile().as_text()
    sizes = {int(n) for n in re.findall(r"= \(s32\[(\d+)\].* sort\(", text)}
    assert sizes == {8 * 384 * lm.config.experts_per_token // shared(mesh)}, sizes


def main(source: str) -> None:
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for full in (False, True) if source == "tiny-random" else (False,):
        alone = found(source, None, full)
        for shape in SHAPES[source][-1:] if full else SHAPES[source]:
            jax.tree.map(close, found(source, make_mesh(*shape), full), alone)
            if source == "tiny-random-moe":
                sorts_its_own(source, make_mesh(*shape))
            print("same", source, *shape, "full" if full else "adapter")


if __name__ == "__main__":
    main(sys.argv[1])
