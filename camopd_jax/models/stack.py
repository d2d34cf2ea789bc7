"""Runs the layers of a model by a scan, and adds their gradient to an earlier gradient in place.

The usual gradient of a scan over layers is an array as large as the parameters, which is then added to the sum over
earlier micro-batches; both are in memory at the same time. Here the sum is passed backward through the layers, and each
layer's gradient is added to its entry as soon as it is computed. `jax.lax.scan` and `jax.checkpoint` determine as usual
what is stored for the backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.models.layers import LayerKind, Positions
from camopd_jax.models.partition import subset
from camopd_jax.types import Params, Residuals

# (parameters of one layer, x [B, S, D], positions, kind of the layer) -> x [B, S, D]
Entries = dict[str, jax.Array]  # of each part of a layer's parameters, its index in the stack
LayerFunction = Callable[[Params, jax.Array, Positions, LayerKind], jax.Array]


def run_layers(
    layer: LayerFunction,
    layers: Params,
    x: jax.Array,
    positions: Positions,
    kinds: LayerKind,
    so_far: Params | None = None,
    residuals: Residuals = (),
) -> jax.Array:
    """Applies all layers to `x` by one scan, so that only one layer is compiled.

    Args:
      layer: computes one layer; the policy of `jax.checkpoint` around it sets what is stored for the backward pass.
      layers: parameters, [L, ...] each.
      x: [B, S, D].
      positions: of the tokens, the same for every layer.
      kinds: of the layers, [L] each.
      so_far: a gradient like `layers` or a subset of them, float32. Differentiate with respect to it, never to
        `layers`: the result is `so_far` plus the gradient of this subset.
      residuals: the input of each layer and the output of the last one, L + 1 arrays [B, S, D], if they are known. The
        forward pass then computes no layer, and the backward pass recomputes each layer from its input.

    Returns:
      [B, S, D].
    """
    inputs = jnp.stack(residuals[:-1]) if residuals else None
    partial_stacks = {name: layers[name] for name in kinds.entries}  # of parameters that only some layers have
    stacks = {name: tree for name, tree in layers.items() if name not in partial_stacks}

    def step(carry: tuple[jax.Array, Params], one: tuple[Any, ...]) -> tuple[tuple[jax.Array, Params], None]:
        x, total = carry
        i, params, kind, known_x = one
        entries = dict.fromkeys(params, i) | kind.entries
        for name, stack in partial_stacks.items():
            params = params | {name: jax.tree.map(partial(_entry, i=entries[name]), stack)}
        if so_far is not None:
            params, total = _collect(params, total, entries)
        if known_x is not None:
            return (_backward_only(layer, params, x, known_x, positions, kind), total), None
        return (layer(params, x, positions, kind), total), None

    count = jax.tree.leaves(stacks)[0].shape[0]
    (x, total), _ = jax.lax.scan(step, (x, so_far), (jnp.arange(count), stacks, kinds, inputs))
    return _finish(residuals[-1] if residuals else x, x, total, so_far)


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward_only(
    layer: LayerFunction, params: Params, x: jax.Array, known_x: jax.Array, positions: Positions, kind: LayerKind
) -> jax.Array:
    """Forward: identity on `x`. Backward: the derivative of `layer` at the known input."""
    return x


_Known = tuple[Params, jax.Array, Positions, LayerKind]  # the arguments of `layer`


def _backward_only_forward(
    layer: LayerFunction, params: Params, x: jax.Array, known_x: jax.Array, positions: Positions, kind: LayerKind
) -> tuple[jax.Array, _Known]:
    return x, (params, known_x, positions, kind)


def _backward_only_backward(
    layer: LayerFunction, saved: _Known, gradient: jax.Array
) -> tuple[Params, jax.Array, None, None, None]:
    params, known_x, positions, kind = saved
    _, pull = jax.vjp(lambda params, x: layer(params, x, positions, kind), params, known_x)
    return *pull(gradient), None, None, None


_backward_only.defvjp(_backward_only_forward, _backward_only_backward)


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
