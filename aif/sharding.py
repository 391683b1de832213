"""Where arrays lie on a mesh of devices: rules over their paths, for weights, adapters, optimizer states and batches.

The mesh has three axes. `data` holds copies of the model that see different rows; `fsdp` does too, but its devices
share the weights among them and gather a layer's when it runs; `tensor` splits every matrix product. Model code never
names an axis: arrays are placed by these rules, a policy carries its mesh, and XLA carries both through the program.
Without a mesh (None) every function here leaves its arrays as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aif.errors import BadInput
from aif.types import Rows

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes whose devices see different rows

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (  # path -> axes of the last dimensions; the first match counts
    (r"(embed|head)$", ("tensor", "fsdp")),
    (r"router/w$", (None, None)),
    (r"(q|k|v|gate|up)/w$", ("fsdp", "tensor")),
    (r"layers/(q|k|v)/b$", ("tensor",)),  # the bias [L, out] of the weights; an adapter has a matrix of that name
    (r"(o|down)/w$", ("tensor", "fsdp")),
    (r"(q|k|v|gate|up)/a$", ("fsdp", None)),
    (r"(o|down)/a$", ("tensor", None)),
    (r"(q|k|v|gate|up)/b$", (None, "tensor")),
    (r"(o|down)/b$", (None, "fsdp")),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """A mesh over all devices of all processes; None for one device, which needs no mesh.

    Raises:
      BadInput: the product of the sizes is not the number of devices.
    """
    sizes, count = (data, fsdp, tensor), jax.device_count()
    if math.prod(sizes) == 1 and jax.process_count() == 1:
        return None
    if math.prod(sizes) != count:
        raise BadInput(
            f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} = {math.prod(sizes)}, and there are {count} devices; "
            "choose sizes whose product is that"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """How an array with this path is split: by the first rule that fits; an axis that has one device, or that does not
    divide the dimension, is left out."""
    path = re.sub(r"/(d|codes|scales)$", "", path)  # the change of a weight, or its few bits, lie as the weight does
    for pattern, axes in RULES:
        if re.search(r"(^|/)" + pattern, path) and len(axes) <= len(shape):
            lead = len(shape) - len(axes)
            sizes = [mesh.shape[axis] if axis else 1 for axis in axes]
            fits = [n > 1 and side % n == 0 for n, side in zip(sizes, shape[lead:], strict=True)]
            found = [None] * lead + [axis if fit else None for axis, fit in zip(axes, fits, strict=True)]
            return PartitionSpec(*found[: max((k + 1 for k, axis in enumerate(found) if axis), default=0)])
    return PartitionSpec()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a tree of weights, adapters or optimizer states."""

    def one(path: tuple, x: Any) -> NamedSharding:
        names = "/".join(str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path)
        return NamedSharding(mesh, spec(names, x.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def place_leaf(mesh: Mesh, path: tuple[str, ...], x: Any) -> jax.Array:
    """One array of the host on its devices, each of which is handed its part alone."""
    lies = NamedSharding(mesh, spec("/".join(path), x.shape, mesh))
    return jax.make_array_from_callback(x.shape, lies, lambda index: x[index])


def place(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with every array on its devices, by the rules."""
    return tree if mesh is None else jax.tree.map(_put, tree, shardings(tree, mesh))


def _put(x: Any, lies: NamedSharding) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # which has no sharding over processes of its own
        return jax.random.wrap_key_data(jax.device_put(jax.random.key_data(x), lies))
    return jax.device_put(x, lies)


def stay(tree: Any, mesh: Mesh | None) -> Any:
    """Within a program: the tree, whose arrays lie by the rules."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def by_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Within a program: the tree, whose arrays' first dimension is shared among the devices of `data` and `fsdp`."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(ROWS)))


def on_own_rows(function: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Within a program: the function, run by every device of `data` and `fsdp` on its own rows of the first argument;
    the others are whole for each. As it is where rows cannot be shared evenly."""

    def run(x: jax.Array, *whole: Any) -> jax.Array:
        if x.shape[0] % shared(mesh):
            return function(x, *whole)
        lies = (PartitionSpec(ROWS), *[PartitionSpec()] * len(whole))
        how = {"mesh": mesh, "in_specs": lies, "out_specs": PartitionSpec(ROWS)}
        return jax.shard_map(function, **how, axis_names=set(ROWS), check_vma=False)(x, *whole)

    return run


def rows(mesh: Mesh | None) -> Rows | None:
    """What the mesh makes of rows; None without one."""
    return None if mesh is None else Rows(partial(by_rows, mesh=mesh), partial(on_own_rows, mesh=mesh))


def vocabulary(params: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Within a program: the parameters, with an embedding and head `[V, D]` that are gathered over `fsdp`. They are
    read row by row and chunk by chunk, and would be gathered for each."""
    if mesh is None:
        return params
    lies = NamedSharding(mesh, PartitionSpec("tensor"))
    found = {name: params[name] for name in ("embed", "head") if name in params}
    return params | jax.lax.with_sharding_constraint(found, lies)


def shared(mesh: Mesh | None) -> int:
    """Among how many devices rows are shared."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def axes(mesh: Mesh | None) -> dict[str, int] | None:
    """Names and sizes of the axes, for a record."""
    return None if mesh is None else dict(mesh.shape)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Within a program: the tree, of which every device holds all."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def host(x: Any) -> np.ndarray:
    """An array in the host's memory, whichever devices and processes hold its parts."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        x = process_allgather(x, tiled=True)
    return np.asarray(x)


def spread(x: Any) -> bool:
    """Whether an array lies on a mesh."""
    return isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
