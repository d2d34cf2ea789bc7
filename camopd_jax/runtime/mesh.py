"""The mesh, the table from logical axes of arrays to mesh axes, and functions for global arrays."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from camopd_jax.config.schema import MeshConfig
from camopd_jax.errors import UserError

T = TypeVar("T")  # a tree of arrays

MESH_AXES = ("data", "fsdp", "tensor")  # and EXPERT, before "tensor", where it has several devices
EXPERT = "expert"

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of prompts, answers, activations, KV cache
    "sequence": None,
    "residual": "tensor",  # the sequence between the matrix products of a layer, where tokens are independent
    "layers": None,  # scanned, never split
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": EXPERT,
}

# Logical axes of activations [B, S, D]. The model width is not split, because the rows are already split over "fsdp".
ACTIVATION = ("batch", "sequence", None)  # for matrix products, and to select tokens from complete rows
RESIDUAL = ("batch", "residual", None)  # between the products: the arrays stored for the backward pass


def mesh_of(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config; `devices` and errors as in `make_mesh`."""
    return make_mesh(config.data, config.fsdp, config.tensor, devices, config.expert)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, expert: int = 1
) -> Mesh:
    """A mesh of all devices. One of the sizes may be -1: all remaining devices.

    Args:
      devices: None: all devices of the run.

    Raises:
      UserError: if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    axes, sizes = _axes(data, fsdp, tensor, expert)
    if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
        raise UserError(f"mesh {dict(zip(axes, sizes, strict=True))}: give sizes >= 1, at most one of them -1")
    sizes = fill_sizes(sizes, len(devices))
    if math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis} {n}" for axis, n in zip(axes, sizes, strict=True))
        raise UserError(f"mesh {wanted} needs {math.prod(sizes)} devices, not {len(devices)}; change config.mesh")
    types = (AxisType.Auto,) * len(axes)
    try:
        return jax.make_mesh(sizes, axes, devices=devices, axis_types=types)
    except NotImplementedError:  # a mesh axis needs a part of a TPU torus axis, as tensor 2 on 4x4x4
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, axes, axis_types=types)


def _axes(data: int, fsdp: int, tensor: int, expert: int) -> tuple[tuple[str, ...], list[int]]:
    """The names and sizes of a mesh's axes."""
    if expert == 1:
        return MESH_AXES, [data, fsdp, tensor]
    return ("data", "fsdp", EXPERT, "tensor"), [data, fsdp, expert, tensor]


def fill_sizes(sizes: Iterable[int], devices: int) -> list[int]:
    """Sizes of mesh axes, with -1 replaced by the number of remaining devices, at least 1."""
    sizes = list(sizes)
    left = max(1, devices // math.prod(n for n in sizes if n != -1))
    return [left if n == -1 else n for n in sizes]


def reshape_mesh(mesh: Mesh, data: int, fsdp: int, tensor: int, field: str, expert: int = 1) -> Mesh:
    """A mesh of the same devices in the same order with other axis sizes, one of which may be -1.

    Raises:
      UserError: naming `field`, if the product of the sizes is not the number of devices.
    """
    axes, shape = _axes(data, fsdp, tensor, expert)
    try:
        return Mesh(mesh.devices.reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))
    except ValueError as error:
        sizes = " x ".join(f"{axis} {n}" for axis, n in zip(axes, shape, strict=True))
        raise UserError(
            f"{field} is {sizes}, but there are {mesh.size} devices; give sizes whose product is {mesh.size}"
        ) from error


def spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical axes (None: not split).

    Raises:
      KeyError: for an axis without a rule.
      ValueError: if two dimensions have the same mesh axis.
    """
    mesh_axes = [None if axis is None else RULES[axis] for axis in axes]
    used = [axis for entry in mesh_axes for axis in _flat(entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} collide on the mesh: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def _flat(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    if isinstance(entry, tuple):
        return entry
    return () if entry is None else (entry,)


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes; without axes, it is replicated."""
    present = (None if entry == EXPERT and EXPERT not in mesh.shape else entry for entry in spec(*axes))
    return NamedSharding(mesh, PartitionSpec(*present))


def expert_shards(mesh: Mesh) -> int:
    """Number of groups of devices over which experts are divided."""
    return int(mesh.shape.get(EXPERT, 1))


def constrain(array: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an intermediate array; without a mesh, returns it unchanged."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, sharding(mesh, *axes))


def constrain_even(array: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """`constrain`, but a dimension that its mesh axes do not divide is not split."""
    if mesh is None:
        return array
    shards = (math.prod(mesh.shape[m] for m in _flat(spec(axis)[0])) for axis in axes)
    even = (axis if n % count == 0 else None for axis, n, count in zip(axes, array.shape, shards, strict=True))
    return constrain(array, mesh, *even)


def batch_shards(mesh: Mesh | None) -> int:
    """Number of shards of a batch; without a mesh, one."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def platform(mesh: Mesh | None) -> str:
    """ "tpu", "gpu" or "cpu": the platform of the mesh's devices, which may differ from that of this process."""
    return "cpu" if mesh is None else mesh.devices.flat[0].platform


def rows_of_process(mesh: Mesh, rows: int) -> np.ndarray:
    """int64[n]: the rows of a batch that this process provides, in ascending order.

    They may not be consecutive: on a TPU torus, the mesh orders devices by the interconnect, not by host.
    """
    pieces = sharding(mesh, "batch").addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[piece] for piece in pieces]))


def check_rows(mesh: Mesh, field: str, rows: int, of: str = "config.mesh") -> None:
    """Raises UserError unless the mesh axes of the batch divide `rows`. `of`: the mesh's config field."""
    shards = batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"{field} is {rows}, which is not a multiple of data x fsdp = {shards} of {of}; "
            f"give a multiple of {shards} or change the mesh"
        )


def global_rows(mesh: Mesh, tree: T, rows: int) -> T:
    """Converts host arrays with the rows `rows_of_process` to global arrays `[rows, ...]` split over the batch axes."""
    batch, own = sharding(mesh, "batch"), rows_of_process(mesh, rows)

    def make_global(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # every device has rows
            return array[np.searchsorted(own, np.arange(rows)[index[0]])]

        return jax.make_array_from_callback((rows, *array.shape[1:]), batch, shard)

    return jax.tree.map(make_global, tree)


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a global array `[rows, ...]` that are on this process, without duplicates, in order."""
    shards = {s.index[0].start or 0: s for s in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def take_rows(tree: T, rows_M: jax.Array, mesh: Mesh | None) -> T:
    """Rows of arrays `[B, ...]`, split over the batch axes. Row number B returns the last row."""

    def take(array: jax.Array) -> jax.Array:
        array = jnp.take(array, rows_M, axis=0, mode="clip")
        return constrain(array, mesh, "batch", *(None,) * (array.ndim - 1))

    return jax.tree.map(take, tree)


def gather(tree: Any) -> Any:
    """Converts global arrays `[rows, ...]` to host arrays of all rows, on every process."""
    return multihost_utils.process_allgather(tree, tiled=True)
