"""Runs the layers of a model by a scan, and adds their gradient to an earlier gradient in place.

The usual gradient of a scan over layers is an array as large as the parameters, which is then added to the sum over
earlier micro-batches; both are in memory at the same time. Here the sum is passed backward through the layers, and each
layer's gradient is added to its entry as soon as it is computed. `jax.lax.scan` and `jax.checkpoint` determine as usual
what is stored for the backward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.models.layers import KeysValues, LayerInputs, LayerKind, Positions
from camopd_jax.models.partition import subset
from camopd_jax.types import Params, Residuals

Entries = dict[str, jax.Array]  # of each part of a layer's parameters, its index in the stack
# (parameters of one layer, x [B, S, D], its other inputs, positions, kind of the layer) -> x [B, S, D]
LayerFunction = Callable[[Params, jax.Array, LayerInputs, Positions, LayerKind], jax.Array]
# The residual stream, the total gradient, and the input of each producer by the attention that uses it
Carry = tuple[jax.Array, Params | None, dict[str, jax.Array]]


@dataclass(frozen=True)
class Producer:
    """A layer whose keys and values later layers use."""

    number: int
    entries: Entries
    keys_values: Callable[[Params, jax.Array, Positions], KeysValues]  # from its parameters and its input


@dataclass(frozen=True)
class Segment:
    """Consecutive layers, which one scan computes."""

    layer: LayerFunction  # the policy of `jax.checkpoint` around it sets what is stored for the backward pass
    kinds: LayerKind  # of the layers, [n] each
    parts: tuple[str, ...]  # of the parameters, which these layers have
    numbers: range  # of the layers
    producers: Mapping[str, Producer] = field(default_factory=dict)  # among them, by the attention that uses them

    @property
    def slice(self) -> slice:
        """Of arrays of all layers, that of these layers."""
        return slice(self.numbers.start, self.numbers.stop)


def run_layers(
    segments: tuple[Segment, ...],
    layers: Params,
    x: jax.Array,
    positions: Positions,
    so_far: Params | None = None,
    residuals: Residuals = (),
    per_layer: jax.Array | None = None,
) -> jax.Array:
    """Applies all layers to `x` by one scan for each segment, so that only one layer of it is compiled.

    Args:
      segments: all layers in their order.
      layers: parameters, [L, ...] each.
      x: [B, S, D].
      positions: of the tokens, the same for every layer.
      so_far: a gradient like `layers` or a subset of them, float32. Differentiate with respect to it, never to
        `layers`: the result is `so_far` plus the gradient of this subset.
      residuals: the input of each layer and the output of the last one, L + 1 arrays [B, S, D], if they are known. The
        forward pass then computes no layer, and the backward pass recomputes each layer from its input.
      per_layer: `LayerInputs.per_layer` of all layers, [L, B, S, E].

    Returns:
      [B, S, D].
    """
    shared: dict[str, KeysValues] = {}
    total = so_far
    for segment in segments:
        own = {name: layers[name] for name in segment.parts}
        part = None if total is None else {name: total[name] for name in segment.parts if name in total}
        inputs = LayerInputs(None if per_layer is None else per_layer[segment.slice], shared)
        known = jnp.stack(residuals[segment.slice]) if residuals else None
        x, part, kept = _scan(segment, own, (x, part, dict.fromkeys(segment.producers, x)), inputs, positions, known)
        for attention, producer in segment.producers.items():
            params = {name: jax.tree.map(partial(_entry, i=producer.entries[name]), own[name]) for name in own}
            if part is not None:
                params, part = _collect(params, part, producer.entries)
            shared = shared | {attention: producer.keys_values(params, kept[attention], positions)}
        total = None if total is None or part is None else total | part
    return _finish(residuals[-1] if residuals else x, x, total, so_far)


def _scan(
    segment: Segment,
    layers: Params,
    start: Carry,
    inputs: LayerInputs,
    positions: Positions,
    known: jax.Array | None,
) -> Carry:
    """The layers of a segment.

    Args:
      layers: the parameters of the segment.
      inputs: of its layers, `per_layer` [n, B, S, E].
      known: the input of each layer, [n, B, S, D], if they are known.
    """
    layer = segment.layer
    partial_stacks = {name: layers[name] for name in segment.kinds.entries}  # of parameters with an index of their own
    stacks = {name: tree for name, tree in layers.items() if name not in partial_stacks}

    def step(carry: Carry, one: tuple[Any, ...]) -> tuple[Carry, None]:
        x, total, kept = carry
        i, params, kind, known_x, per_layer = one
        entries = dict.fromkeys(params, i) | kind.entries
        for name, stack in partial_stacks.items():
            params = params | {name: jax.tree.map(partial(_entry, i=entries[name]), stack)}
        if total is not None:
            params, total = _collect(params, total, entries)
        for attention, producer in segment.producers.items():
            here = x if known_x is None else _at_known(x, known_x)
            kept = kept | {attention: jnp.where(i == producer.number, here, kept[attention])}
        own = inputs.replace(per_layer=per_layer)
        if known_x is not None:
            return (_backward_only(layer, x, (params, known_x, own, positions, kind)), total, kept), None
        return (layer(params, x, own, positions, kind), total, kept), None

    numbers = jnp.asarray(segment.numbers)
    end, _ = jax.lax.scan(step, start, (numbers, stacks, segment.kinds, known, inputs.per_layer))
    return end


def _entry(stack: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)


@jax.custom_vjp
def _collect(params: Params, total: Params, entries: Entries) -> tuple[Params, Params]:
    """Forward: identity. Backward: adds the gradient of the layer's parameters to their entries of the total."""
    return params, total


def _collect_forward(params: Params, total: Params, entries: Entries) -> tuple[tuple[Params, Params], Entries]:
    return (params, total), entries


def _collect_backward(entries: Entries, gradients: tuple[Params, Params]) -> tuple[None, Params, None]:
    of_params, total = gradients

    def add(total: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(total, _entry(total, i) + part.astype(jnp.float32), i, 0)

    part = subset(of_params, like=total)
    return None, {name: jax.tree.map(partial(add, i=entries[name]), total[name], part[name]) for name in total}, None


_collect.defvjp(_collect_forward, _collect_backward)


_Known = tuple[Params, jax.Array, LayerInputs, Positions, LayerKind]  # the arguments of a layer


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward_only(layer: LayerFunction, x: jax.Array, known: _Known) -> jax.Array:
    """Forward: identity on `x`. Backward: the derivative of `layer` at its known arguments."""
    return x


def _backward_only_forward(layer: LayerFunction, x: jax.Array, known: _Known) -> tuple[jax.Array, _Known]:
    return x, known


def _backward_only_backward(
    layer: LayerFunction, known: _Known, gradient: jax.Array
) -> tuple[jax.Array, tuple[Params, None, LayerInputs, None, None]]:
    params, known_x, inputs, positions, kind = known
    _, pull = jax.vjp(lambda params, x, inputs: layer(params, x, inputs, positions, kind), params, known_x, inputs)
    of_params, of_x, of_inputs = pull(gradient)
    return of_x, (of_params, None, of_inputs, None, None)


_backward_only.defvjp(_backward_only_forward, _backward_only_backward)


@jax.custom_vjp
def _at_known(x: jax.Array, known_x: jax.Array) -> jax.Array:
    """Forward: the known value of `x`. Backward: identity."""
    return known_x


_at_known.defvjp(lambda x, known_x: (known_x, None), lambda _, gradient: (gradient, None))


@jax.custom_vjp
def _finish(value: jax.Array, x: jax.Array, total: Params | None, so_far: Params | None) -> jax.Array:
    """Forward: returns `value`. Backward: `x` gets the gradient of `value`, and the total starts as `so_far`."""
    return value


def _finish_forward(
    value: jax.Array, x: jax.Array, total: Params | None, so_far: Params | None
) -> tuple[jax.Array, Params | None]:
    return value, so_far


def _finish_backward(so_far: Params | None, gradient: jax.Array) -> tuple[None, jax.Array, Params | None, None]:
    return None, gradient, so_far, None


_finish.defvjp(_finish_forward, _finish_backward)
