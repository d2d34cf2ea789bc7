"""Low-rank adapters (LoRA, arXiv 2106.09685) as leaves beside the kernels that they modify.

With an adapter of rank r, a kernel W [in..., out...] has three more leaves beside it, `lora_a` A [in..., r], `lora_b`
B [r, out...] and the constant `lora_scale` s, and its layer computes `x W + s (x A) B` (Eq 3 there, s = alpha / r).
The layers of a module are stacked, so A and B have the largest rank of any layer. Where a layer has a smaller rank, or
no adapter at all, the remaining columns of A and rows of B are zero. Training keeps these zeros: the gradient of a
column of A is a multiple of the row of B, and that of the row of B a multiple of the column of A, so that both are
exactly zero, and so are Adam's moments, its updates and the weight decay.
"""

from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.models.config import ModelConfig
from camopd_jax.models.weights import LORA_A, LORA_B, LORA_SCALE, adapter_rows, tree_of
from camopd_jax.types import Params

LEAVES = (LORA_A, LORA_B, LORA_SCALE)


def init(config: ModelConfig, key: jax.Array, scale: float = 1.0) -> Params:
    """The leaves of a new adapter, float32: A uniform in +-1 / sqrt(inputs), as in PEFT, and B zero.

    Args:
      config: its `adapter` says which modules have one, and their ranks.
    """
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for number, row in enumerate(adapter_rows(config)):
        shape, leaf = row.shape(config.num_layers), row.path[-1]
        if leaf == LORA_A:
            bound = row.hf_shape[1] ** -0.5
            leaves[row.path] = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
        else:
            leaves[row.path] = jnp.full(shape, scale if leaf == LORA_SCALE else 0.0)
    return tree_of(leaves)


def attach(params: Params, leaves: Params) -> Params:
    """`params` with the leaves of `leaves` added, or in place of its own. Neither is changed."""
    if not isinstance(leaves, dict):
        return leaves
    return params | {name: attach(params.get(name, {}), node) for name, node in leaves.items()}


def matrices(params: Params) -> Params:
    """The matrices A and B of all adapters in a tree, which training changes; {} if there are none."""
    return _select(params, (LORA_A, LORA_B))


def all_leaves(params: Params) -> Params:
    """All leaves of adapters in a tree."""
    return _select(params, LEAVES)


def without(params: Params) -> Params:
    """A tree without the leaves of adapters."""
    kept = {name: without(node) if isinstance(node, dict) else node for name, node in params.items()}
    return {name: node for name, node in kept.items() if name not in LEAVES}


def _select(tree: Params, names: tuple[str, ...]) -> Params:
    chosen = {
        name: _select(node, names) if isinstance(node, dict) else node
        for name, node in tree.items()
        if isinstance(node, dict) or name in names
    }
    return {name: node for name, node in chosen.items() if not isinstance(node, dict) or node}


def merge_layer(layer: Params) -> Params:
    """One layer's parameters without adapters: `W + s A B`, float32, in place of each kernel W with an adapter."""
    tree = {name: merge_layer(node) if isinstance(node, dict) else node for name, node in layer.items()}
    if LORA_A not in tree:
        return tree
    a, b = (tree[name].astype(jnp.float32) for name in (LORA_A, LORA_B))
    product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    return without(tree) | {"kernel": tree["kernel"].astype(jnp.float32) + tree[LORA_SCALE] * product}


def merge(params: Params) -> Params:
    """All parameters without adapters; a kernel that had one keeps its dtype and sharding.

    Every module is merged one layer at a time, so that little more than the result is in memory.
    """
    return {name: _merge_stacked(node) if name == "layers" else node for name, node in params.items()}


def _merge_stacked(tree: Params) -> Params:
    tree = {name: _merge_stacked(node) if isinstance(node, dict) else node for name, node in tree.items()}
    if LORA_A not in tree:
        return tree
    kernel = tree["kernel"]
    leaves = {name: tree[name] for name in (*LEAVES, "kernel")}

    def merged(leaves: dict[str, Any]) -> jax.Array:
        return jax.lax.map(lambda layer: merge_layer(layer)["kernel"].astype(kernel.dtype), leaves)

    return without(tree) | {"kernel": jax.jit(merged, out_shardings=kernel.sharding)(leaves)}
