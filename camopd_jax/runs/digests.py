"""Digests of what a checkpoint holds, which tell whether it was read as it was saved."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from camopd_jax.runtime.mesh import gather
from camopd_jax.types import TrainState


def digests(state: TrainState, positions: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """Of each array by name, the two numbers of `_array_digest`; of the JSON values, a hash.

    They do not depend on how arrays are sharded. Every process has to call it.
    """
    of_arrays = gather(_of_arrays(ocp.tree.to_flat_dict(state, sep="/")))
    of_json = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in (("positions", positions), ("provenance", provenance))
    }
    return {name: values.tolist() for name, values in of_arrays.items()} | of_json


@jax.jit
def _of_arrays(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _array_digest(array) for name, array in arrays.items()}


def _array_digest(array: jax.Array) -> jax.Array:
    """uint32[2]: the sum of the elements' bits, and that sum with each element times an odd number of its own.

    Integer sums are exact in any order, so that every mesh gives the same.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    number = jnp.zeros_like(bits)
    for axis, size in enumerate(array.shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    weighted = bits * (2 * number + 1)
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (bits, weighted)])
