"""Runs the layers of a model one after the other, and adds their gradient to an earlier one in place.

Differentiated by its parameters, a scan over layers returns a gradient as large as they are, which is then added to the
sum over earlier micro-batches: both lie in memory. Here that sum travels backward through the layers beside the
gradient of the activations, and each layer's gradient is added to its entry as soon as it is known. What the layers
keep for their backward pass is left to JAX: to `jax.lax.scan`, and to `jax.checkpoint` where a layer is wrapped in it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.models.layers import LayerKind, Positions
from camopd_jax.models.partition import subset
from camopd_jax.types import Params, Residuals

# (parameters of one layer, x [B, S, D], where the tokens stand, the layer's kind) -> x [B, S, D]
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
    """`x` through all layers, by one scan: one layer is compiled, whatever the depth.

    Args:
      layer: computes one layer; wrapped in `jax.checkpoint`, the policy says what is kept for the backward pass.
      layers: parameters, [L, ...] each.
      x: [B, S, D].
      positions: where the tokens stand, the same for every layer.
      kinds: of each layer, [L] each.
      so_far: a gradient like `layers`, or like a part of them, float32. Differentiate by it and never by `layers`: what
        comes back is `so_far` plus the gradient of that part.
      residuals: what enters each layer and what leaves the last, L + 1 arrays [B, S, D], where they are known: there is
        no forward pass then, and the backward pass computes each layer again from what enters it.

    Returns:
      [B, S, D].
    """
    inputs = jnp.stack(residuals[:-1]) if residuals else None

    def step(carry: tuple[jax.Array, Params], one: tuple[Any, ...]) -> tuple[tuple[jax.Array, Params], None]:
        x, total = carry
        i, params, kind, known_x = one
        if so_far is not None:
            params, total = _collect(params, total, i)
        if known_x is not None:
            return (_backward_only(layer, params, x, known_x, positions, kind), total), None
        return (layer(params, x, positions, kind), total), None

    count = jax.tree.leaves(layers)[0].shape[0]
    (x, total), _ = jax.lax.scan(step, (x, so_far), (jnp.arange(count), layers, kinds, inputs))
    return _finish(residuals[-1] if residuals else x, x, total, so_far)


@jax.custom_vjp
def _collect(params: Params, total: Params, i: jax.Array) -> tuple[Params, Params]:
    """A layer's parameters and the total as they are; backward, their gradient is added to entry `i` of the total."""
    return params, total


def _collect_forward(params: Params, total: Params, i: jax.Array) -> tuple[tuple[Params, Params], jax.Array]:
    return (params, total), i


def _collect_backward(i: jax.Array, gradients: tuple[Params, Params]) -> tuple[None, Params, None]:
    of_params, total = gradients

    def add(total: jax.Array, part: jax.Array) -> jax.Array:
        entry = jax.lax.dynamic_index_in_dim(total, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, entry + part.astype(jnp.float32), i, 0)

    return None, jax.tree.map(add, total, subset(of_params, like=total)), None


_collect.defvjp(_collect_forward, _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward_only(
    layer: LayerFunction, params: Params, x: jax.Array, known_x: jax.Array, positions: Positions, kind: LayerKind
) -> jax.Array:
    """A layer whose input is known from elsewhere: forward it does nothing, backward it is `layer` at that input."""
    return x


_Known = tuple[Params, jax.Array, Positions, LayerKind]  # what a layer is computed from


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
    """`value`; backward, its gradient is that of `x`, and the total begins as `so_far`."""
    return value


def _finish_forward(
    value: jax.Array, x: jax.Array, total: Params | None, so_far: Params | None
) -> tuple[jax.Array, Params | None]:
    return value, so_far


def _finish_backward(so_far: Params | None, gradient: jax.Array) -> tuple[None, jax.Array, Params | None, None]:
    return None, gradient, so_far, None


_finish.defvjp(_finish_forward, _finish_backward)
