"""Masks, and means over the real tokens of padded arrays."""

import jax
import jax.numpy as jnp


def length_mask(lengths_B: jax.Array, size: int) -> jax.Array:
    """bool[B, size], True for the first `lengths_B[b]` slots of each row."""
    return jnp.arange(size)[None, :] < lengths_B[:, None]


def row_mean(values_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Mean of each row's first `lengths_B[b]` values, float32[B]; 0 for a row of length 0.

    >>> row_mean(jnp.array([[1.0, 3.0, 99.0]]), jnp.array([2]))
    Array([2.], dtype=float32)
    """
    mask_BT = length_mask(lengths_B, values_BT.shape[1])
    total_B = jnp.sum(jnp.where(mask_BT, values_BT, 0), axis=1, dtype=jnp.float32)
    return total_B / jnp.maximum(lengths_B, 1)


def token_mean(values_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Mean over all real tokens of the batch, float32[]; 0 for a batch without tokens."""
    mask_BT = length_mask(lengths_B, values_BT.shape[1])
    total = jnp.sum(jnp.where(mask_BT, values_BT, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(lengths_B), 1)
