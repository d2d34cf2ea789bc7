"""A table of the parameters: path, names of the Hugging Face tensors, and logical axes.

The table defines shardings, import and export. A parameter without a row and a tensor without a parameter are errors.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig, Routing
from camopd_jax.runtime.mesh import RULES, expert_shards, sharding
from camopd_jax.types import ATTENTION, MLP, SHARING, WIDE_MLP, Params

ATTENTIONS = (*SHARING, *SHARING.values())  # all names of attentions

Path = tuple[str, ...]  # of a parameter in the tree

# Hugging Face names of the modules of a layer (after "model.layers.N.") and of the modules outside the layers.
MODULE_NAMES = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "final_norm": "model.norm",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "post_mlp_norm": "post_feedforward_layernorm",
}

LORA_A, LORA_B, LORA_SCALE = "lora_a", "lora_b", "lora_scale"  # the leaves of an adapter beside a kernel
KERNEL_SCALE = "kernel_scale"  # beside a kernel in int8 (`models.quantised`)
PEFT_PREFIX = "base_model.model."  # before the names of all tensors of a PEFT adapter
# Hugging Face names of the leaves of a module, and of the parameters that are no module's
_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "shift": "bias",
    "embedding": "weight",
    "per_layer_embedding": "weight",
    "head": "weight",
}  # of others, `module_names` has the complete name


@dataclass(frozen=True)
class WeightRow:
    """One parameter: the Hugging Face tensor or a part of it, viewed as `split` and transposed by `order`.

    >>> row = WeightRow(("layers", "attention", "query", "kernel"), "model.layers.{}.self_attn.q_proj.weight",
    ...           ("layers", "embed", "heads", "head_dim"), split=(9, 64, 576), order=(2, 0, 1), hf_shape=(576, 576))
    >>> row.shape(layers=30), row.names(layers=2)[1]
    ((30, 576, 9, 64), 'model.layers.1.self_attn.q_proj.weight')
    """

    path: Path
    hf_name: str  # with {} for the layer number, if the parameter is stacked
    axes: tuple[str | None, ...]  # logical axes of the parameter, "layers" first if it is stacked
    split: tuple[int, ...]  # the tensor's dimensions, with heads and head width as two dimensions
    order: tuple[int, ...]
    hf_shape: tuple[int, ...]  # of the tensor
    experts: int = 0  # how many experts the parameter has; they are its axis after "layers"
    part: tuple[slice, ...] = ()  # of the tensor's dimensions; (): all of it
    layers: tuple[int, ...] | None = None  # the numbers of the layers that have it; None: all of the model

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf_name

    @property
    def module(self) -> str:
        """The module in a layer, as in `MODULE_NAMES`."""
        return ".".join(self.path[1:-1])

    @property
    def matrices(self) -> int:
        """The number of axes of the Hugging Face tensor that count matrices: 1 if it has all experts of a layer."""
        return int(self.experts > 0 and self.hf_name.count("{}") == 1)

    @property
    def outputs(self) -> int:
        """The number of a kernel's output axes, its last ones; without `matrices`, the first ones of `split`."""
        return 1 if self.experts else self.order[0]

    def shape(self, layers: int) -> tuple[int, ...]:
        """The shape of the parameter in a model with this number of layers."""
        return (*self.stack(layers), *(self.split[i] for i in self.order))

    def stack(self, layers: int) -> tuple[int, ...]:
        """The first dimensions of the parameter: over these, its Hugging Face tensors are stacked."""
        count = layers if self.layers is None else len(self.layers)
        return (count, self.experts)[: self.hf_name.count("{}")]

    def names(self, layers: int) -> list[str]:
        """Names of the Hugging Face tensors of the parameter: one for each layer, each of its experts, or only one."""
        indices = np.ndindex(self.stack(layers))
        if self.layers is None:
            return [self.hf_name.format(*index) for index in indices]
        return [self.hf_name.format(self.layers[index[0]], *index[1:]) for index in indices]

    def part_of(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter's part of a Hugging Face tensor."""
        return tensor[self.part]

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """A view of a Hugging Face tensor with the parameter's shape; nothing is read or copied."""
        return self.part_of(tensor).reshape(self.split).transpose(self.order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_hf`: the parameter's part of the tensor."""
        shape = self.part_of(np.broadcast_to(False, self.hf_shape)).shape
        return array.transpose(np.argsort(self.order)).reshape(shape)


def table(c: ModelConfig) -> tuple[WeightRow, ...]:
    """The rows of all parameters of a model: those in its files, the scales of int8 kernels, and its adapter's."""
    scales = (scale_row(row) for row in _rows(c) if in_int8(row)) if c.int8 else ()
    return (*file_rows(c), *scales, *adapter_rows(c))


def file_rows(c: ModelConfig) -> tuple[WeightRow, ...]:
    """The rows of the parameters that are in a model's files."""
    return tuple(row for rows in tensor_rows(c) for row in rows)


def unused_names(c: ModelConfig) -> frozenset[str]:
    """Tensors without effect that a checkpoint may have: of keys and values, in layers that use those of another."""
    without = dataclasses.replace(c, sharing_layers=0, sharing_size=None) if c.sharing_layers else c
    of_both = ({name for row in file_rows(of) for name in row.names(c.num_layers)} for of in (without, c))
    return frozenset(next(of_both) - next(of_both))


def tensor_rows(c: ModelConfig) -> list[tuple[WeightRow, ...]]:
    """The rows of each Hugging Face tensor: several, in their order in the tensor, if it has several parameters."""
    rows_of: dict[tuple[str, tuple[int, ...] | None], list[WeightRow]] = {}
    for row in _rows(c):
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
    kernels = {row.module: row for row in _rows(c) if row.path[-1] == "kernel" and row.stacked}
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


def _rows(c: ModelConfig) -> Iterator[WeightRow]:
    d, v = c.hidden_size, c.vocab_size
    names = MODULE_NAMES | dict(c.module_names)

    def top(path: Path, axes: tuple[str | None, ...], split: tuple[int, ...], order: tuple[int, ...]) -> WeightRow:
        return WeightRow(path, f"{names[path[0]]}.{_LEAVES[path[-1]]}", axes, split, order, split)

    def layer(
        module: str,
        leaf: str,
        axes: tuple[str | None, ...],
        split: tuple[int, ...],
        order: tuple[int, ...] = (0,),
        hf_shape: tuple[int, ...] | None = None,
    ) -> WeightRow:
        name = names.get(f"{module}.{leaf}") or f"{names[module]}.{_LEAVES[leaf]}"
        path = ("layers", *module.split("."), leaf)
        return WeightRow(path, f"model.layers.{{}}.{name}", ("layers", *axes), split, order, hf_shape or split)

    yield top(("embedding",), ("vocab", "embed"), (v, d), (0, 1))
    if not c.tied_head:
        yield top(("head",), ("embed", "vocab"), (v, d), (1, 0))
    of_norm = ("scale", "shift") if c.norm_bias else ("scale",)
    for leaf in of_norm:
        yield top(("final_norm", leaf), (None,), (d,), (0,))

    if (of_layer := c.per_layer_input) is not None:
        e, all_layers = of_layer.size, c.num_layers * of_layer.size
        yield top(("per_layer_embedding",), ("vocab", "embed"), (of_layer.vocab_size, all_layers), (0, 1))
        yield top(("per_layer_projection", "kernel"), ("embed", None), (all_layers, d), (1, 0))
        yield top(("per_layer_norm", "scale"), (None,), (e,), (0,))
        yield layer("input_gate", "kernel", ("embed", None), (e, d), (1, 0))
        yield layer("input_projection", "kernel", (None, "embed"), (d, e), (1, 0))
        yield layer("post_input_norm", "scale", (None,), (d,))

    for norm in ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm"):
        if (c.post_norms if norm.startswith("post_") else c.pre_norms) and not (c.parallel and norm == "mlp_norm"):
            for leaf in of_norm:
                yield layer(norm, leaf, (None,), (d,))

    if c.layer_scalar:
        yield layer("output_scalar", "scale", (None,), (1,))
    for attention, of in c.of_attentions.items():
        layers = None if len(c.of_attentions) == 1 else c.layers_with(attention)
        for row in _attention_rows(of, layer):
            yield dataclasses.replace(row, path=("layers", attention, *row.path[2:]), layers=layers)

    if c.sharing_size is not None:
        first = c.num_layers - c.sharing_layers
        wide = dataclasses.replace(c, intermediate_size=c.sharing_size)
        for of, name, numbers in ((c, MLP, range(first)), (wide, WIDE_MLP, range(first, c.num_layers))):
            for row in _feed_forward_rows(of, layer, MLP):
                yield dataclasses.replace(row, path=("layers", name, *row.path[2:]), layers=tuple(numbers))
    elif c.routing is None or c.dense_size is None:
        yield from _feed_forward_rows(c, layer, "mlp", c.routing)
    else:
        yield from _feed_forward_rows(c, layer, "mlp")
        for norm in ("post_dense_norm", "experts_norm", "post_experts_norm", "router_norm"):
            yield layer(norm, "scale", (None,), (d,))
        yield from _feed_forward_rows(c, layer, "experts", c.routing)


def _feed_forward_rows(
    c: ModelConfig, layer: Callable[..., WeightRow], module: str, routing: Routing | None = None
) -> Iterator[WeightRow]:
    """The rows of a feed-forward, or of experts and their router; `layer` makes a row as in `_rows`."""
    d, f = c.hidden_size, c.feed_forward_size if routing is None else c.intermediate_size
    if routing is not None:
        yield layer(f"{module}.router", "kernel", ("embed", None), (routing.experts, d), (1, 0))
        if c.mlp_bias:
            yield layer(f"{module}.router", "bias", (None,), (routing.experts,))
        if routing.scaled:
            yield layer(f"{module}.router", "scale", (None,), (routing.experts,))
    matrices = {"gate": (f, d, "embed", "mlp"), "up": (f, d, "embed", "mlp"), "down": (d, f, "mlp", "embed")}
    if not c.gated_mlp:
        del matrices["gate"]
    for name, (outputs, inputs, in_axis, out_axis) in matrices.items():
        rows = [layer(f"{module}.{name}", "kernel", (in_axis, out_axis), (outputs, inputs), (1, 0))]
        if c.mlp_bias:
            rows.append(layer(f"{module}.{name}", "bias", ("mlp" if out_axis == "mlp" else None,), (outputs,)))
        for row in rows:
            yield row if routing is None else _of_experts(row, routing)


def _of_experts(row: WeightRow, routing: Routing) -> WeightRow:
    """A feed-forward's row for all experts of a layer."""
    count, name = routing.experts, row.path[-2]
    row = dataclasses.replace(row, experts=count, axes=("layers", "experts", *row.axes[1:]))
    if routing.stacked is None:
        return row
    second = int(name == "up")
    if routing.stacked == "columns":
        split = (count, *(row.split[i] for i in row.order))
        order, axis, part = tuple(range(len(split))), len(split) - 1, slice(second, None, 2)
    else:
        split, order = (count, *row.split), (0, *(1 + i for i in row.order))
        axis, part = 1, slice(second * split[1], (second + 1) * split[1])
    if name == "down":
        return dataclasses.replace(row, split=split, order=order, hf_shape=split)
    hf_shape = tuple(2 * n if i == axis else n for i, n in enumerate(split))
    parts = (*(slice(None),) * axis, part)
    return dataclasses.replace(row, split=split, order=order, hf_shape=hf_shape, part=parts)


def _attention_rows(c: ModelConfig, layer: Callable[..., WeightRow]) -> Iterator[WeightRow]:
    """The rows of attention, which all layers of `c` have; `layer` makes a row as in `_rows`."""
    d, k = c.hidden_size, c.head_dim
    projections = {
        "query": (c.num_heads, "heads", c.qk_norm),
        "key": (c.num_kv_heads, "kv_heads", c.qk_norm),
        "value": (c.num_kv_heads, "kv_heads", None),
    }
    if c.keys_as_values:
        del projections["value"]
    if c.shares_keys:
        projections = {"query": projections["query"]}
    for name, (heads, axis, normed) in projections.items():
        module, shape = f"attention.{name}", (heads * k, d)
        yield layer(module, "kernel", ("embed", axis, "head_dim"), (heads, k, d), (2, 0, 1), shape)
        if c.qkv_bias:
            yield layer(module, "bias", (axis, "head_dim"), (heads, k), (0, 1), (heads * k,))
        if normed == "head":
            yield layer(f"{module}_norm", "scale", (None,), (k,))
        elif normed == "projection":
            yield layer(f"{module}_norm", "scale", (axis, "head_dim"), (heads, k), (0, 1), (heads * k,))
    if c.attention_sinks:
        yield layer("attention", "sinks", ("heads",), (c.num_heads,))
    heads_split, shape = (d, c.num_heads, k), (d, c.num_heads * k)
    yield layer("attention.output", "kernel", ("heads", "head_dim", "embed"), heads_split, (1, 2, 0), shape)
    if c.output_bias:
        yield layer("attention.output", "bias", (None,), (d,))


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
