"""The layers of a model, with gradients that are added where earlier ones lie.

Differentiated the plain way, a stack of layers gives a new gradient as large as itself, which is then added to the one
so far: both lie there. Here the backward pass adds each layer's gradient to its place in the one so far.

Where the residual stream is known already, there is no forward pass: the backward pass begins with what leaves the last
layer and computes each layer again from what enters it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.types import Params

# (one layer's parameters, x, what all layers share, what is its own) -> x; under jax.checkpoint it says what is kept
Layer = Callable[[Params, jax.Array, Any, Any], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def through(
    layer: Layer, stack: Params, so_far: Params, x: jax.Array, shared: Any, own: Any, residuals: jax.Array | None
) -> jax.Array:
    """`x` through all layers.

    Differentiate by `so_far`, never by `stack`: what comes back is `so_far` plus the stack's gradient, float32.

    Args:
      stack: parameters [L, ...]; so_far: the same in float32.
      shared: the same for every layer; own: of each layer, [L, ...]. Neither has a gradient.
      residuals: [L + 1, B, S, D], what enters each layer and what leaves the last, if that is known; for a layer that
        keeps nothing else.
    """
    return _forward(layer, stack, so_far, x, shared, own, residuals)[0]


def _pull(layer: Layer, params: Params, x: jax.Array, shared: Any, mine: Any):
    """A layer's output, its backward pass as a tree, and which leaves of that are not at hand there anyway."""
    out, pull = jax.vjp(lambda params, x: layer(params, x, shared, mine), params, x)
    leaves, structure = jax.tree.flatten(pull)
    at_hand = {id(leaf) for leaf in jax.tree.leaves((params, shared, mine))}
    return out, leaves, structure, [i for i, leaf in enumerate(leaves) if id(leaf) not in at_hand]


def _forward(layer, stack, so_far, x, shared, own, residuals):
    if residuals is not None:
        return residuals[-1], (stack, so_far, (residuals[:-1], []), shared, own)

    def step(x, one):
        params, mine = one
        out, leaves, _, kept = _pull(layer, params, x, shared, mine)
        return out, (x, [leaves[i] for i in kept if leaves[i] is not x])

    out, saved = jax.lax.scan(step, x, (stack, own))
    return out, (stack, so_far, saved, shared, own)


def _backward(layer, kept, gradient):
    stack, so_far, saved, shared, own = kept

    def step(carry, one):
        gradient, total = carry
        i, params, (x, kept_leaves), mine = one
        # Traced once more for its structure: of its arithmetic, only what was not kept is left in the program.
        _, leaves, structure, kept = _pull(layer, params, x, shared, mine)
        for place, leaf in zip([i for i in kept if leaves[i] is not x], kept_leaves, strict=True):
            leaves[place] = leaf
        to_params, to_x = jax.tree.unflatten(structure, leaves)(gradient)

        def add(whole: jax.Array, part: jax.Array) -> jax.Array:
            place = jax.lax.dynamic_index_in_dim(whole, i, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(whole, place + part.astype(jnp.float32), i, 0)

        return (to_x, jax.tree.map(add, total, to_params)), None

    numbers = jnp.arange(len(jax.tree.leaves(stack)[0]))
    (to_x, total), _ = jax.lax.scan(step, (gradient, so_far), (numbers, stack, saved, own), reverse=True)
    return None, total, to_x, None, None, None


through.defvjp(_forward, _backward)
