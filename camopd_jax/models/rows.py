"""One row for each parameter of a model: path, names of the Hugging Face tensors, and logical axes."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from camopd_jax.models.config import ModelConfig, Routing
from camopd_jax.types import MLP, WIDE_MLP

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


def model_rows(c: ModelConfig) -> Iterator[WeightRow]:
    """The rows of the parameters that are in a model's files, without the parts of tensors."""
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
        first = c.first_sharing
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
    """The rows of a feed-forward, or of experts and their router; `layer` makes a row as in `model_rows`."""
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
    """The rows of attention, which all layers of `c` have; `layer` makes a row as in `model_rows`."""
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
