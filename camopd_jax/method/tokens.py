"""The tokens of a step's batch, which objectives and token weights compare with each other."""

import jax
import jax.numpy as jnp
from flax import struct

from camopd_jax.types import LogProbs, Record


class Tokens(struct.PyTreeNode):
    """What constants of a batch's tokens may depend on; constants."""

    ids: jax.Array  # int32[B, T]
    trained: jax.Array  # bool[B, T], the tokens of the selected answers
    lengths: jax.Array  # int32[B], of the answers
    log_probs: LogProbs
    record: Record  # stored values: of `TokenWeight.read`, `Objective.read` and `Objective.read_student`
    keys: jax.Array | None  # a random key for each row; they depend on the seed, the step and the row's prompt


def largest(values_BT: jax.Array, among_BT: jax.Array, share: float) -> jax.Array:
    """bool[B, T], the `share` of these tokens with the largest values, at least one; ties with the last one too."""
    count = jnp.ceil(share * jnp.sum(among_BT) - 1e-3).astype(jnp.int32)  # the product may be rounded up
    return among_BT & (values_BT >= nth_largest(values_BT, among_BT, count - 1))


def nth_largest(values_BT: jax.Array, among_BT: jax.Array, n: jax.Array) -> jax.Array:
    """The value of these tokens that n of them exceed, if all differ; float32[]. n < 0 counts as 0."""
    descending_N = jnp.sort(jnp.where(among_BT, values_BT, -jnp.inf).reshape(-1), descending=True)
    return descending_N[jnp.maximum(n, 0)]
