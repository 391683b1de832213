"""What a train step would need on devices that are not here: compiled ahead of time, without weights.

The step is the one that trains, with the config's corpus, objective and mesh; only its arrays are shapes. It is
compiled for so many fake CPU devices, so sizes and collectives are those of XLA's partitioner, while kernels and the
memory that an accelerator's own compiler saves or spends are not known: on CPU, bfloat16 products are computed in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif.batches import Dataset, stream
from aif.config import Config
from aif.errors import BadInput
from aif.experiment import Experiment
from aif.hlo import Sent, collectives, flops
from aif.models.hub import LM, weightless
from aif.objectives import Unfitted
from aif.sharding import shardings, shared
from aif.sources import stacked
from aif.train import attach, start_state, train_step
from aif.types import Batch, as_partial


class Weightless(Experiment):
    """An experiment whose parameters are shapes."""

    @cached_property
    def lm(self) -> LM:
        config, tokenizer, params = weightless(self.config.model.source)
        return LM(config, placed(params, self.mesh), tokenizer, self.config.model.source, "")


@dataclass(frozen=True)
class Plan:
    """Bytes are per device; `activations` are what the backward pass keeps of the forward pass: about so much of
    `temporary`."""

    devices: int
    tokens: int
    weights: int
    trained: int
    optimizer: int
    batch: int
    activations: int
    temporary: int
    flops: int
    collectives: dict[str, Sent]

    @property
    def peak(self) -> int:
        """Bytes that a device must have."""
        return self.weights + self.trained + self.optimizer + self.batch + self.temporary

    def seconds(self, peak: float, bandwidth: float) -> tuple[float, float]:
        """(seconds of the products, seconds of the collectives) of a step, at `peak` operations and `bandwidth` bytes a
        second of each device."""
        return self.flops / self.devices / peak, sum(c.sent for c in self.collectives.values()) / bandwidth


def plan(config: Config, arm: str | None = None) -> Plan:
    """Compile an arm's step for the config's mesh and read off what it needs.

    Raises:
      BadInput: the mesh has another number of devices than there are; an objective that samples or fits a reader.
    """
    e = Weightless(config)
    spec = config.arms[arm or next(iter(config.arms))]
    mesh, full = e.mesh, config.adapter.kind == "full"
    trainable = e.lm.params if full else placed(jax.eval_shape(partial(e.fresh, 0)), mesh)
    state = placed(jax.eval_shape(start_state, trainable, jax.random.key(0)), mesh)
    batches, loss = example(e, spec, e.reference(trainable))
    base = e.steered(spec)
    values = e.settings(spec, 0).optimizer.values(0, spec.steps)
    traced = train_step.trace(state, base, batches, loss, values, full=full)
    compiled = traced.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # XLA:CPU tells both
    given = [per_device(x) for x in (base.params, state.trainable, state.optimizer)]
    spare = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return Plan(
        1 if mesh is None else mesh.size,
        int((batches.segments > 0).sum()),
        *given,
        batch=per_device(batches),
        activations=kept(partial(_total, full), state.trainable, base, loss, batches) // shared(mesh),
        temporary=spare,
        flops=flops(traced.jaxpr.jaxpr),
        collectives=collectives(text),
    )


def placed(tree: Any, mesh: Any) -> Any:
    """Shapes with their places on the mesh."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    at = shardings(tree, mesh)
    return jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), tree, at)


def example(e: Experiment, spec: Any, reference: Any) -> tuple[Batch, Any]:
    """A step's batches of the config's corpus, with the shapes of the objective's facts, and its loss."""
    try:
        objective = e.objective(spec)
    except Unfitted as error:
        raise BadInput(f"plan: {spec.objective.name}: {error}; plan it with reader.name=ratings") from error
    data = e.examples(objective, None)
    if not isinstance(data, Dataset):
        raise BadInput(f"plan: {spec.objective.name} samples its answers; plan an objective on the corpus instead")
    c, key = e.config.batch, jax.random.key(0)
    source = stream(data, rows=c.rows, seed=0)
    micro = next(source)
    if data.beside is not None:
        micro = micro._replace(beside=next(stream(data.beside, rows=objective.beside.rows or c.rows, seed=0)))  # pyright: ignore
    facts = jax.eval_shape(objective.prepare, reference.replace(remat="none"), micro, key)
    micro = micro._replace(extras={**micro.extras, **{n: np.zeros(x.shape, x.dtype) for n, x in facts.items()}})
    loss = objective.loss if objective.schedule is None else objective.schedule(0.0)
    return stacked([micro] * c.accumulate), as_partial(loss)


def per_device(tree: Any) -> int:
    """Bytes of the arrays on one device."""
    size = 0
    for x in jax.tree.leaves(tree):
        lies = getattr(x, "sharding", None)
        shape = x.shape if lies is None else lies.shard_shape(x.shape)
        dtype = jnp.uint32 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype
        size += prod(shape) * jnp.dtype(dtype).itemsize
    return size


def _total(full: bool, trainable: Any, base: Any, loss: Any, batches: Batch) -> Any:
    return loss(attach(base, trainable, full), jax.tree.map(lambda x: x[0], batches)).means[0].sum


def kept(total: Any, trainable: Any, *others: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass and was not given, over all devices."""
    made = jax.make_jaxpr(lambda t, *more: jax.vjp(lambda t: total(t, *more), t)[1])(trainable, *others).jaxpr
    given = {*made.invars, *made.constvars}
    fresh = {v for v in made.outvars if type(v).__name__ == "Var" and v not in given}
    return sum(prod(v.aval.shape) * v.aval.dtype.itemsize for v in fresh)  # pyright: ignore[reportAttributeAccessIssue]
