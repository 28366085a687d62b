"""Where every array lies on the devices: the mesh, one table of rules, and the check that the rules hold.

Networks name the axes of each parameter (`nnx.Param(..., axes=("layers", "embed", "mlp"))`) and know no
device; `RULES` says which mesh axis cuts which of those names. A batch is cut over `data` and `fsdp` together.
Nothing here moves activations: `jax.jit` derives that from the parameters and the batch. The training step reads
this; so may anything that puts a large model on several devices.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsearch.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

AnyMesh = Mesh | AbstractMesh
"""A layout can be planned for devices that are not there."""

RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "positions": None,
    "norm": None,
    "lora_rank": None,
}
"""Logical axis of a parameter → mesh axis that cuts it (None: every device holds the whole axis)."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes with axes `MESH_AXES`.

    Args:
        data, fsdp, tensor: number of devices along each axis; one of them may be -1, "whatever is left".
    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    num_devices = jax.device_count()
    wanted = f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{wanted}: sizes must be positive, and at most one of them -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(num_devices // math.prod(size for size in sizes if size != -1), 1)
    if math.prod(sizes) != num_devices:
        raise InputError(
            f"{wanted} does not fit {num_devices} device(s): the product of the three must be {num_devices}"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def flatten_state(state: nnx.State) -> dict[str, Any]:
    """{dotted parameter name: array} in the order in which `jax.tree` visits the state."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_dotted(path): leaf for path, leaf in leaves}


def unflatten_state(template: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """The state of `template`'s structure that holds `arrays`; inverse of `flatten_state`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree.unflatten(structure, [arrays[_dotted(path)] for path, _ in leaves])


def param_axes(model_or_state: nnx.Module | nnx.State) -> dict[str, tuple[str | None, ...] | None]:
    """{dotted name: the axes its metadata states, or None where it states none}."""
    return {
        name: None if axes is None else tuple(axes) for name, (_, axes) in _variables(model_or_state).items()
    }


def is_kernel(state: nnx.State) -> dict[str, bool]:
    """{dotted name: whether it is a matrix or a table}; vectors stay vectors when layers are stacked."""
    flat = flatten_state(state)
    return {
        name: (sum(axis != "layers" for axis in axes) if axes else flat[name].ndim) >= 2
        for name, axes in param_axes(state).items()
    }


def param_shardings(model_or_state: nnx.Module | nnx.State, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """{dotted name: sharding} for every variable, from the axes that its metadata names and `RULES`.

    A variable without axes is replicated, which is refused for an `nnx.Param` where fsdp or tensor exceeds 1:
    it would quietly cost every device the whole array.

    Raises:
        InputError: (all at once) an axis that `RULES` does not know, two axes of one parameter on the same mesh
            axis, another number of names than of dimensions, a dimension that its mesh axis does not divide.
    """
    shardings, problems = {}, []
    for name, (variable, axes) in _variables(model_or_state).items():
        shape = tuple(variable.get_value().shape)
        if axes is None:
            shardings[name] = NamedSharding(mesh, PartitionSpec())
            if isinstance(variable, nnx.Param) and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
                problems.append(f"{name}: states no axes")
            continue
        found = _problems_of(shape, axes, mesh)
        problems += [f"{name} {shape} {tuple(axes)}: {problem}" for problem in found]
        if not found:
            spec = PartitionSpec(*(RULES[axis] if axis else None for axis in axes))
            shardings[name] = NamedSharding(mesh, spec)
    if problems:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise InputError(
            f"parameters that cannot be laid out on the mesh {sizes}:\n  " + "\n  ".join(problems)
        )
    return shardings


def batch_sharding(mesh: AnyMesh, *, microbatched: bool = False) -> NamedSharding:
    """The leading axis over `data` and `fsdp`; the second one if the first counts microbatches."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES) if microbatched else PartitionSpec(BATCH_AXES))


def on_one_device(arrays: Any) -> Any:
    """A pytree's arrays on this process's first device, for programs that were compiled for one; no copy if there.

    What lies on several processes is gathered: all of them must ask for it.
    """
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(arrays)):
        arrays = multihost_utils.process_allgather(arrays, tiled=True)
    return jax.device_put(arrays, jax.local_devices()[0])


def put_batch(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A batch that every process has whole, each of its devices getting its own rows."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: AnyMesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard_model(model: nnx.Module, mesh: Mesh) -> None:
    """Lays the model's arrays out on the mesh, in place."""
    state = nnx.state(model)
    arrays = flatten_state(state)
    nnx.update(model, unflatten_state(state, jax.device_put(arrays, param_shardings(state, mesh))))


def _problems_of(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: AnyMesh) -> list[str]:
    if len(shape) != len(axes):
        return [f"{len(axes)} axis names for {len(shape)} dimensions"]
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        return [f"unknown axis {axis!r} (known: {', '.join(RULES)})" for axis in unknown]
    problems, taken = [], {}
    for size, axis in zip(shape, axes, strict=True):
        mesh_axis = RULES[axis] if axis else None
        if mesh_axis is None:
            continue
        if mesh_axis in taken:
            problems.append(f"{taken[mesh_axis]!r} and {axis!r} both want the mesh axis {mesh_axis!r}")
        taken[mesh_axis] = axis
        if size % mesh.shape[mesh_axis]:
            problems.append(f"{axis!r} of {size} is not divisible by {mesh_axis}={mesh.shape[mesh_axis]}")
    return problems


def _variables(model_or_state: nnx.Module | nnx.State) -> dict[str, tuple[nnx.Variable, Any]]:
    state = model_or_state if isinstance(model_or_state, nnx.State) else nnx.state(model_or_state)
    flat = nnx.to_flat_state(state)
    return {
        ".".join(map(str, path)): (variable, variable.get_metadata().get("axes")) for path, variable in flat
    }


def _dotted(path: tuple[Any, ...]) -> str:
    """`.layers.0.kernel` as "layers.0.kernel"; the variable's own last step, `.value`, is left out."""
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
