"""One row for each parameter: where it is in our tree, what Hugging Face calls it, how it lies on the mesh.

The table drives initial shardings, import and export. A parameter without a row raises, and so does a
tensor without a parameter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig
from camopd_jax.runtime.mesh import RULES, sharding
from camopd_jax.types import Params


@dataclass(frozen=True)
class Row:
    """One parameter. The Hugging Face tensor, viewed as `split` and transposed by `order`, is ours.

    >>> row = Row(("layers", "attention", "query", "kernel"), "model.layers.{}.self_attn.q_proj.weight",
    ...           ("layers", "embed", "heads", "head_dim"), split=(9, 64, 576), order=(2, 0, 1), hf_shape=(576, 576))
    >>> row.shape(layers=30)
    (30, 576, 9, 64)
    """

    path: tuple[str, ...]
    hf_name: str  # with {} for the layer, where the parameter is stacked
    axes: tuple[str | None, ...]  # logical axes of our array, "layers" first where it is stacked
    split: tuple[int, ...]  # the tensor's dimensions, with heads and head width apart
    order: tuple[int, ...]
    hf_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf_name

    def shape(self, layers: int) -> tuple[int, ...]:
        """Of our array."""
        ours = tuple(self.split[i] for i in self.order)
        return (layers, *ours) if self.stacked else ours

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """A view of one layer's Hugging Face tensor as ours; nothing is read or copied."""
        return tensor.reshape(self.split).transpose(self.order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_hf`."""
        return array.transpose(np.argsort(self.order)).reshape(self.hf_shape)


def table(c: ModelConfig) -> tuple[Row, ...]:
    """The parameters of a model."""
    return tuple(_rows(c))


def _rows(c: ModelConfig) -> Iterator[Row]:
    d, f, k, v = c.hidden_size, c.intermediate_size, c.head_dim, c.vocab_size

    def top(path: tuple[str, ...], name: str, axes, split, order) -> Row:
        return Row(path, name, axes, split, order, split)

    def layer(path: str, name: str, axes, split, order, hf_shape=None) -> Row:
        hf_name = "model.layers.{}." + name
        return Row(("layers", *path.split(".")), hf_name, ("layers", *axes), split, order, hf_shape or split)

    yield top(("embedding",), "model.embed_tokens.weight", ("vocab", "embed"), (v, d), (0, 1))
    if not c.tied_head:
        yield top(("head",), "lm_head.weight", ("embed", "vocab"), (v, d), (1, 0))
    yield top(("final_norm", "scale"), "model.norm.weight", (None,), (d,), (0,))

    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.post_norms:
        norms = {
            "attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm",
        }  # fmt: skip
    for ours, theirs in norms.items():
        yield layer(f"{ours}.scale", f"{theirs}.weight", (None,), (d,), (0,))

    projections = {"query": ("q", c.num_heads, "heads"), "key": ("k", c.num_kv_heads, "kv_heads"),
                   "value": ("v", c.num_kv_heads, "kv_heads")}  # fmt: skip
    for ours, (letter, heads, axis) in projections.items():
        name = f"self_attn.{letter}_proj"
        yield layer(f"attention.{ours}.kernel", f"{name}.weight", ("embed", axis, "head_dim"),
                    (heads, k, d), (2, 0, 1), (heads * k, d))  # fmt: skip
        if c.qkv_bias:
            yield layer(f"attention.{ours}.bias", f"{name}.bias", (axis, "head_dim"), (heads, k), (0, 1), (heads * k,))
        if c.qk_norm and ours != "value":
            yield layer(f"attention.{ours}_norm.scale", f"self_attn.{letter}_norm.weight", (None,), (k,), (0,))
    yield layer("attention.output.kernel", "self_attn.o_proj.weight", ("heads", "head_dim", "embed"),
                (d, c.num_heads, k), (1, 2, 0), (d, c.num_heads * k))  # fmt: skip
    if c.output_bias:
        yield layer("attention.output.bias", "self_attn.o_proj.bias", (None,), (d,), (0,))

    feed_forward = {"gate": (f, d, "embed", "mlp"), "up": (f, d, "embed", "mlp"), "down": (d, f, "mlp", "embed")}
    for ours, (outputs, inputs, in_axis, out_axis) in feed_forward.items():
        name = f"mlp.{ours}_proj"
        yield layer(f"mlp.{ours}.kernel", f"{name}.weight", (in_axis, out_axis), (outputs, inputs), (1, 0))
        if c.mlp_bias:
            bias_axis = "mlp" if out_axis == "mlp" else None
            yield layer(f"mlp.{ours}.bias", f"{name}.bias", (bias_axis,), (outputs,), (0,))


def shardings(c: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, as a tree like the parameters.

    Raises:
      UserError: if a dimension does not divide over its mesh axis, with the mend.
    """
    sizes: dict[str, dict[str, int]] = {}  # mesh axis -> what it splits -> how long that is
    for row in table(c):
        for axis, size in zip(row.axes, row.shape(c.num_layers), strict=True):
            if axis is not None and RULES[axis] is not None:
                sizes.setdefault(RULES[axis], {})[axis] = size
    for mesh_axis, split in sizes.items():
        given, common = mesh.shape[mesh_axis], math.gcd(*split.values())
        if common % given:
            odd = ", ".join(f"{axis} = {size}" for axis, size in split.items() if size % given)
            fit = ", ".join(str(n) for n in range(1, mesh.size + 1) if common % n == 0)
            raise UserError(
                f"config.mesh.{mesh_axis} is {given}, which does not divide the model's {odd}; "
                f"of up to {mesh.size} devices it can be {fit}"
            )
    return tree_of({row.path: sharding(mesh, *row.axes) for row in table(c)})


def layer_by_layer(c: ModelConfig, mesh: Mesh) -> Params:
    """`shardings`, each layer's apart, in a tuple."""
    places = shardings(c, mesh)
    layer = jax.tree.map(lambda place: NamedSharding(mesh, PartitionSpec(*place.spec[1:])), places["layers"])
    return places | {"layers": (layer,) * c.num_layers}


def tree_of(leaves: dict[tuple[str, ...], object]) -> Params:
    """A nested dict from {path: leaf}."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def leaf_of(tree: Params, path: tuple[str, ...]) -> jax.Array | NamedSharding:
    """The leaf at a path; raises KeyError where there is none."""
    for name in path:
        tree = tree[name]
    return tree


def check_rows_cover(params: Params, c: ModelConfig) -> None:
    """Raises KeyError if a parameter has no row or a row no parameter."""
    paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    odd = paths ^ {row.path for row in table(c)}
    if odd:
        raise KeyError(f"parameters and table differ at {sorted('.'.join(p) for p in odd)}")
