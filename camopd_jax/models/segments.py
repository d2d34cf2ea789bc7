"""Which layers of a model one scan computes, and what each of them reads of the stacked parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.models.config import ModelConfig
from camopd_jax.models.layers import Block, KeysValues, LayerInputs, LayerKind, Positions
from camopd_jax.models.stack import LayerFunction, Producer, Segment
from camopd_jax.models.weights import layer_tree
from camopd_jax.types import ATTENTIONS, GLOBAL_ATTENTION, MLP, SHARING, WIDE_MLP, Params

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None, "rollout": None}


def segments(c: ModelConfig, blocks: Mapping[str, Block], remat: str, layers: Params) -> tuple[Segment, ...]:
    """All layers of a model: those with keys and values of their own, and those that use these.

    Args:
      blocks: by the name of the attention.
      remat: `Model.remat`.
      layers: the stacked parameters.
    """
    if not c.sharing_layers:
        apart = tuple(c.of_attentions) if c.global_attention is not None else ()
        return (_segment(c, blocks, remat, range(c.num_layers), tuple(layers), apart),)
    first = c.first_sharing
    of_using = {*SHARING.values(), WIDE_MLP}
    of_own = {*SHARING, *([MLP] if WIDE_MLP in layers else [])}
    parts, others = (tuple(name for name in layers if name not in absent) for absent in (of_using, of_own))
    own = _segment(c, blocks, remat, range(first), parts, parts)
    using = _segment(c, blocks, remat, range(first, c.num_layers), others, others)
    producers = {name: _producer(c, blocks, number, parts) for name, number in c.producers.items()}
    return dataclasses.replace(own, producers=producers), using


def place(c: ModelConfig, attention: str, positions: Positions, kind: LayerKind) -> tuple[Positions, LayerKind]:
    """Positions and kind of a layer as its block reads them, which knows only layers with the same attention."""
    if c.global_attention is None:
        return positions, kind
    return positions.of_global() if _is_global(attention) else positions, LayerKind(0, 0)


def _is_global(attention: str) -> bool:
    return attention in (GLOBAL_ATTENTION, SHARING[GLOBAL_ATTENTION])


def _segment(
    c: ModelConfig,
    blocks: Mapping[str, Block],
    remat: str,
    layers: range,
    parts: tuple[str, ...],
    apart: tuple[str, ...],
) -> Segment:
    """Some layers of a model.

    Args:
      parts: of the parameters, which these layers have.
      apart: those of which each layer has an index of its own. The index of an attention that a layer does not have
        is 0; its gradient there is 0 too.
    """
    names = [c.layer_attention[i] for i in layers]
    rope, window = (jnp.asarray([of[i] for i in layers], jnp.int32) for of in (c.layer_rope, c.layer_window))
    is_global = jnp.asarray([_is_global(name) for name in names])
    indices = [_indices(c, i, apart) for i in layers]
    entries = {part: jnp.asarray([of_layer[part] for of_layer in indices], jnp.int32) for part in apart}
    function = _layer_function(c, {name: blocks[name] for name in dict.fromkeys(names)}, remat)
    return Segment(function, LayerKind(rope, window, is_global, entries), parts, layers)


def _indices(c: ModelConfig, layer: int, parts: tuple[str, ...]) -> dict[str, int]:
    """The index of a layer in the stacks of these parts of the parameters."""
    name, indices = c.layer_attention[layer], dict.fromkeys(parts, layer)
    indices |= {part: c.stack_index[layer] if part == name else 0 for part in ATTENTIONS if part in parts}
    if WIDE_MLP in parts:
        indices[WIDE_MLP] = layer - c.first_sharing
    return indices


def _layer_function(c: ModelConfig, blocks: Mapping[str, Block], remat: str) -> LayerFunction:
    """Blocks as a function of a layer with one of these attentions, wrapped in `jax.checkpoint` as `remat` says."""

    def layer(params: Params, x: jax.Array, inputs: LayerInputs, positions: Positions, kind: LayerKind) -> jax.Array:
        def of(name: str) -> LayerFunction:
            def apply(
                params: Params, x: jax.Array, inputs: LayerInputs, positions: Positions, kind: LayerKind
            ) -> jax.Array:
                shared, own = inputs.shared.get(name), {"params": layer_tree(params, name)}
                positions, kind = place(c, name, positions, kind)
                output: jax.Array = blocks[name].apply(own, x, positions, kind, None, inputs.per_layer, shared)[0]
                return output

            return apply

        functions = {_is_global(name): of(name) for name in blocks}
        arguments = params, x, inputs, positions, kind
        if len(functions) == 1:
            return next(iter(functions.values()))(*arguments)
        output: jax.Array = jax.lax.cond(kind.is_global, functions[True], functions[False], *arguments)
        return output

    if remat == "none":
        return layer
    return jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)


def _producer(c: ModelConfig, blocks: Mapping[str, Block], number: int, parts: tuple[str, ...]) -> Producer:
    """A layer whose keys and values others use."""
    attention = c.layer_attention[number]
    entries = {part: jnp.int32(i) for part, i in _indices(c, number, parts).items()}

    def keys_values(params: Params, x: jax.Array, positions: Positions) -> KeysValues:
        """As the layer computes them. Its other results are not used, so that the compiler leaves them out."""
        own, kind = {"params": layer_tree(params, attention)}, LayerKind(c.layer_rope[number], c.layer_window[number])
        gate = None if c.per_layer_input is None else jnp.zeros((*x.shape[:-1], c.per_layer_input.size), x.dtype)
        result: Any = blocks[attention].apply(own, x, *place(c, attention, positions, kind), None, gate)
        keys, values = result[1]
        return keys, values

    return Producer(number, entries, keys_values)
