"""The layers of a model, with gradients that are added where earlier ones lie.

Differentiated the plain way, a stack of layers gives a new gradient as large as itself, which is then added to the one
so far: both lie there. Here the backward pass adds each layer's gradient to its place in the one so far.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.types import Params

Layer = Callable[[Params, jax.Array, Any, Any], jax.Array]  # (one layer's parameters, x, shared, its own) -> x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def through(layer: Layer, stack: Params, so_far: Params, x: jax.Array, shared: Any, own: Any) -> jax.Array:
    """`x` through all layers. Of the backward pass only the layers' inputs are kept.

    Differentiate by `so_far`, never by `stack`: what comes back is `so_far` plus the stack's gradient, float32.

    Args:
      stack: parameters [L, ...]; so_far: the same in float32.
      shared: the same for every layer; own: of each layer, [L, ...]. Neither has a gradient.
    """
    return _forward(layer, stack, so_far, x, shared, own)[0]


def _forward(layer, stack, so_far, x, shared, own):
    def step(x, one):
        return layer(one[0], x, shared, one[1]), x

    out, inputs = jax.lax.scan(step, x, (stack, own))
    return out, (stack, so_far, inputs, shared, own)


def _backward(layer, saved, gradient):
    stack, so_far, inputs, shared, own = saved

    def step(carry, one):
        gradient, total = carry
        i, params, x, mine = one
        _, pull = jax.vjp(lambda params, x: layer(params, x, shared, mine), params, x)
        to_params, to_x = pull(gradient)

        def add(whole: jax.Array, part: jax.Array) -> jax.Array:
            place = jax.lax.dynamic_index_in_dim(whole, i, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(whole, place + part.astype(jnp.float32), i, 0)

        return (to_x, jax.tree.map(add, total, to_params)), None

    layers = jnp.arange(len(inputs))
    (to_x, total), _ = jax.lax.scan(step, (gradient, so_far), (layers, stack, inputs, own), reverse=True)
    return None, total, to_x, None, None


through.defvjp(_forward, _backward)
