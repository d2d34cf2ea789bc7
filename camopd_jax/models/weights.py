"""A table of the parameters: path, names of the Hugging Face tensors, and logical axes.

The table defines shardings, import and export. A parameter without a row and a tensor without a parameter are errors.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.rows import Path, WeightRow, model_rows
from camopd_jax.runtime.mesh import RULES, expert_shards, sharding
from camopd_jax.types import ATTENTION, ATTENTIONS, MLP, SHARING, WIDE_MLP, Params

LORA_A, LORA_B, LORA_SCALE = "lora_a", "lora_b", "lora_scale"  # the leaves of an adapter beside a kernel
KERNEL_SCALE = "kernel_scale"  # beside a kernel in int8 (`models.quantised`)
PEFT_PREFIX = "base_model.model."  # before the names of all tensors of a PEFT adapter


def table(c: ModelConfig) -> tuple[WeightRow, ...]:
    """The rows of all parameters of a model: those in its files, the scales of int8 kernels, and its adapter's."""
    scales = (scale_row(row) for row in model_rows(c) if in_int8(row)) if c.int8 else ()
    return (*file_rows(c), *scales, *adapter_rows(c))


def file_rows(c: ModelConfig) -> tuple[WeightRow, ...]:
    """The rows of the parameters that are in a model's files."""
    return tuple(row for rows in tensor_rows(c) for row in rows)


def unused_names(c: ModelConfig) -> frozenset[str]:
    """Tensors without effect that a checkpoint may have: of keys and values, in layers that use those of another."""
    of_both = ({name for row in file_rows(of) for name in row.names(c.num_layers)} for of in (c.without_sharing, c))
    return frozenset(next(of_both) - next(of_both))


def tensor_rows(c: ModelConfig) -> list[tuple[WeightRow, ...]]:
    """The rows of each Hugging Face tensor: several, in their order in the tensor, if it has several parameters."""
    rows_of: dict[tuple[str, tuple[int, ...] | None], list[WeightRow]] = {}
    for row in model_rows(c):
        rows_of.setdefault((row.hf_name, row.layers), []).append(row)
    return [_parts(rows) for rows in rows_of.values()]


def _parts(rows: list[WeightRow]) -> tuple[WeightRow, ...]:
    """The rows of one tensor, each with its part."""
    if len(rows) == 1 or rows[0].part:
        return tuple(rows)
    stops = list(itertools.accumulate(row.hf_shape[0] for row in rows))
    shape = (stops[-1], *rows[0].hf_shape[1:])
    parts = map(slice, [0, *stops[:-1]], stops)
    return tuple(dataclasses.replace(row, hf_shape=shape, part=(part,)) for row, part in zip(rows, parts, strict=True))


def in_int8(row: WeightRow) -> bool:
    """Whether a parameter is int8 in a model with `ModelConfig.int8`: all kernels of layers, but those of routers."""
    return row.path[-1] == "kernel" and row.stacked and "router" not in row.path


def scale_row(kernel: WeightRow) -> WeightRow:
    """The row of the scales of a kernel in int8, which are split like its outputs. No file has them."""
    inputs = len(kernel.order) - kernel.outputs - kernel.matrices
    start = -kernel.outputs - inputs  # of the inputs among the kernel's axes
    shape = tuple(kernel.split[i] for i in kernel.order)
    split = (*shape[:start], *shape[-kernel.outputs :])
    return dataclasses.replace(
        kernel,
        path=(*kernel.path[:-1], KERNEL_SCALE),
        hf_name=f"{kernel.hf_name.removesuffix('.weight')}.{KERNEL_SCALE}",
        axes=(*kernel.axes[:start], *kernel.axes[-kernel.outputs :]),
        split=split,
        order=tuple(range(len(split))),
        hf_shape=(math.prod(split),),
        part=(),
    )


def leaf_dtype(c: ModelConfig, row: WeightRow, dtype: str) -> str:
    """The dtype of a parameter of a model whose other parameters have this dtype, if its kernels may be int8."""
    if row.path[-1] == KERNEL_SCALE:
        return "float32"
    return "int8" if c.int8 and in_int8(row) else dtype


def adapter_rows(c: ModelConfig) -> tuple[WeightRow, ...]:
    """The rows of an adapter's leaves (`models.adapters`), by the names of PEFT. No file has a `lora_scale`.

    A is split like the kernel's inputs and B like its outputs; the rank is not split.
    """
    kernels = {row.module: row for row in model_rows(c) if row.path[-1] == "kernel" and row.stacked}
    return tuple(row for module, rank in c.adapter for row in _low_rank_rows(kernels[module], rank))


def _low_rank_rows(kernel: WeightRow, rank: int) -> Iterator[WeightRow]:
    """The rows of one kernel's adapter. The kernel's inputs are its first axes, but the last ones of its tensor."""
    outputs, (wide, narrow) = kernel.outputs, kernel.hf_shape
    inputs = len(kernel.order) - outputs
    axes, module = kernel.axes[1:], PEFT_PREFIX + kernel.hf_name.removesuffix(".weight")

    def row(
        leaf: str,
        name: str,
        axes: tuple[str | None, ...] = (),
        split: tuple[int, ...] = (),
        order: tuple[int, ...] = (),
        hf_shape: tuple[int, ...] = (),
    ) -> WeightRow:
        path = (*kernel.path[:-1], leaf)
        return WeightRow(path, f"{module}.{name}", ("layers", *axes), split, order, hf_shape, layers=kernel.layers)

    a_split, a_order = (rank, *kernel.split[outputs:]), (*range(1, inputs + 1), 0)
    yield row(LORA_A, "lora_A.weight", (*axes[:inputs], None), a_split, a_order, (rank, narrow))
    b_split, b_order = (*kernel.split[:outputs], rank), (outputs, *range(outputs))
    yield row(LORA_B, "lora_B.weight", (None, *axes[inputs:]), b_split, b_order, (wide, rank))
    yield row(LORA_SCALE, LORA_SCALE)


def shardings(c: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, as a tree like the parameters.

    Raises:
      UserError: if a mesh axis does not divide a dimension, with the sizes that do; if experts are to be divided and
        the model has none.
    """
    if (shards := expert_shards(mesh)) > 1 and c.routing is None:
        raise UserError(f"config.mesh.expert is {shards}, but a model has no experts; give 1")
    sizes: dict[str, dict[str, int]] = {}  # mesh axis -> logical axes that it splits -> their sizes
    for row in table(c):
        for axis, size in zip(row.axes, row.shape(c.num_layers), strict=True):
            rule = RULES[axis] if axis is not None else None
            if isinstance(rule, str) and axis is not None:
                of_axis = sizes.setdefault(rule, {})
                of_axis[axis] = math.gcd(size, of_axis.get(axis, 0))
    for mesh_axis, split in sizes.items():
        given, common = mesh.shape.get(mesh_axis, 1), math.gcd(*split.values())
        if common % given:
            odd = ", ".join(f"{axis} = {size}" for axis, size in split.items() if size % given)
            fit = ", ".join(str(n) for n in range(1, mesh.size + 1) if common % n == 0)
            raise UserError(
                f"config.mesh.{mesh_axis} is {given}, which does not divide the model's {odd}; "
                f"with up to {mesh.size} devices it can be {fit}"
            )
    return tree_of({row.path: sharding(mesh, *row.axes) for row in table(c)})


def decoding_shardings(c: ModelConfig, mesh: Mesh) -> Params:
    """`shardings` of the parameters for decoding, where "layers" is a tuple with one tree for each layer.

    Adapters are merged into the kernels, except into those in int8.
    """
    tree = shardings(c if c.int8 else dataclasses.replace(c, adapter=()), mesh)
    stacked = jax.tree.map(lambda stacked: NamedSharding(mesh, PartitionSpec(*stacked.spec[1:])), tree["layers"])
    return tree | {"layers": tuple(layer_tree(stacked, attention) for attention in c.layer_attention)}


def layer_tree(layers: Params, attention: str) -> Params:
    """Of a tree of all layers' parameters, what a layer with this attention has, under the names that `Block` reads."""
    others = {name: tree for name, tree in layers.items() if name not in (*ATTENTIONS, WIDE_MLP)}
    if WIDE_MLP in layers and attention in SHARING.values():
        others[MLP] = layers[WIDE_MLP]
    return others | {ATTENTION: layers[attention]}


def tree_of(leaves: Mapping[Path, Any]) -> Params:
    """A nested dict from {path: leaf}."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def leaf_of(tree: Params, path: Path) -> Any:
    """The leaf at a path; raises KeyError if there is none."""
    for name in path:
        tree = tree[name]
    return tree


def check_rows_cover(params: Params, c: ModelConfig) -> None:
    """Raises KeyError if a parameter has no row or a row has no parameter."""
    paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    odd = paths ^ {row.path for row in table(c)}
    if odd:
        raise KeyError(f"parameters and table differ at {sorted('.'.join(p) for p in odd)}")
