"""Attention of one new token per row over a cache, by a Pallas kernel for NVIDIA GPUs.

A block of the cache in which a row sees no token is neither read nor computed: slots of a prompt's padding, slots that
are not written yet, and tokens outside the window. Every device computes its own rows and heads.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.errors import UserError
from camopd_jax.models.config import AttentionSpec, ModelConfig
from camopd_jax.runtime.mesh import platform
from camopd_jax.runtime.mesh import spec as axes_spec

_BLOCKS = (128, 64, 32, 16)  # sizes of a block of slots; a product on a GPU has at least 16 rows and columns
_QUERIES = 16  # the query heads of a group are padded to at least this
_LOWEST = jnp.finfo(jnp.float32).min


def unsupported_reason(config: ModelConfig, mesh: Mesh | None, dtype: str) -> str | None:
    """The reason why the kernel does not support a model on a mesh; None if it does. As in `fused`."""
    if config.attention_sinks:
        return "no kernel has the attention sinks of this model"
    if mesh is None or platform(mesh) != "gpu":
        return "only GPUs have a kernel"
    if dtype not in ("bfloat16", "float16"):
        return f"the kernel multiplies bfloat16, not {dtype}; give config.compute.matmul=bfloat16"
    if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
        return f"the kernel needs a head_dim that is a power of two from 16 on, not {config.head_dim}"
    return None


def check(config: ModelConfig, mesh: Mesh | None, dtype: str) -> None:
    """Raises UserError if the kernel does not support a model."""
    if why := unsupported_reason(config, mesh, dtype):
        raise UserError(f"config.compute.decode_attention is 'fused'; {why}; give xla")


def block_size(slots: int) -> int | None:
    """The largest size of blocks that divides a cache of `slots` slots; None: the kernel cannot read it."""
    return next((size for size in _BLOCKS if slots % size == 0), None)


def attend_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """Softmax attention of one query per row and head.

    Args:
      query: [N, 1, H, K]. The mesh's batch axes divide N, and its tensor axis H and G.
      key, value: [N, G, S, K] of the cache; `block_size` divides S.
      seen: bool[N, S], the slots that each row attends to, at least one.

    Returns:
      [N, 1, H, K].
    """
    assert spec.mesh is not None, "a kernel is chosen by the devices of a mesh"
    interpret = spec.mesh.devices.flat[0].platform == "cpu"
    local = partial(_attend, scale=spec.scale, softcap=spec.softcap, interpret=interpret)
    rows = axes_spec("batch", "sequence", "heads", None)
    cached = axes_spec("batch", "kv_heads", "sequence", None)
    of_rows = axes_spec("batch", "sequence")
    split = jax.shard_map(
        local, mesh=spec.mesh, in_specs=(rows, cached, cached, of_rows), out_specs=rows, check_vma=False
    )
    return split(query, key, value, seen)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """`attend_cache` on one device: a program of the kernel for each row and group of heads."""
    (rows, _, heads, width), (groups, slots) = query.shape, key.shape[1:3]
    each, size = heads // groups, block_size(slots)
    assert size is not None
    padded = max(_QUERIES, 1 << (each - 1).bit_length())
    query = query.reshape(rows, groups, each, width)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, padded - each), (0, 0)))
    blocks = slots // size
    used = jnp.any(seen.reshape(rows, blocks, size), axis=-1).astype(jnp.int32)

    from jax.experimental import pallas as pl  # slow to import, and only needed here
    from jax.experimental.pallas import triton

    def of_group(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda row, group: (row, group, 0, 0))

    def of_row(length: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, length), lambda row, group: (row, 0))

    out = pl.pallas_call(
        partial(_kernel, size=size, scale=scale, softcap=softcap),
        grid=(rows, groups),
        in_specs=[
            of_group(padded, width),
            of_group(slots, width),
            of_group(slots, width),
            of_row(slots),
            of_row(blocks),
        ],
        out_specs=of_group(padded, width),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_cache",
    )(query, key, value, seen.astype(jnp.int32), used)
    return out[:, :, :each].reshape(rows, 1, heads, width)


def _kernel(
    query: Any, key: Any, value: Any, seen: Any, used: Any, out: Any, *, size: int, scale: float, softcap: float | None
) -> None:
    """One row and group: query [Q, K], key and value [S, K], seen int32[S], used int32[S / size], out [Q, K].

    Softmax over the blocks one after another, with the largest score and the sum so far (Milakov and Gimelshein,
    arXiv 1805.02867).
    """
    from jax.experimental.pallas import ds
    from jax.experimental.pallas.triton import dot

    of_queries = query[...]
    count, width = of_queries.shape

    def add(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, largest, sums = carry
        at = ds(block * size, size)
        scores = dot(of_queries, key[at, :].T) * scale  # float32[Q, size]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        visible = (seen[at] != 0)[None, :]
        scores = jnp.where(visible, scores, _LOWEST)
        now = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp(scores - now[:, None]), 0.0)
        kept = jnp.exp(largest - now)
        values = value[at, :]
        total = total * kept[:, None] + dot(weights.astype(values.dtype), values)
        return total, now, sums * kept + jnp.sum(weights, axis=1)

    def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return jax.lax.cond(used[block] != 0, partial(add, block), lambda carry: carry, carry)

    start = jnp.zeros((count, width), jnp.float32), jnp.full((count,), _LOWEST), jnp.zeros((count,), jnp.float32)
    total, _, sums = jax.lax.fori_loop(0, key.shape[0] // size, step, start)
    out[...] = (total / jnp.maximum(sums, 1e-30)[:, None]).astype(out.dtype)
