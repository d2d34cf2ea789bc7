"""Attention in one function: plain matrix products, or the platform's kernel (fused.py, and cached.py over a cache)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.models import cached, fused
from camopd_jax.models.config import AttentionSpec
from camopd_jax.models.products import einsum, multiply_to_float32
from camopd_jax.runtime.mesh import batch_shards, platform
from camopd_jax.types import EMPTY

# At most this many attention scores (query-key pairs of all rows and heads of one chip) exist at a time.
_MAX_SCORES = 2**26
_HALVED_FROM = 128  # queries per row: from here on, a CPU is faster with `_attend_by_halves`


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array | None,
    spec: AttentionSpec,
    window_index: jax.Array | int = 0,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of grouped heads, `[B, S, H, K]`.

    A query attends to keys at its own and earlier positions, within the window. The mask is computed only from
    positions; an EMPTY slot has a position later than any query's.

    Args:
      query: [B, S, H, K].
      key, value: [B, G, S', K], heads first as in a cache, so that decoding needs no transpose. G divides H.
      query_positions: int32[B or 1, S].
      key_positions: int32[B or 1, S']; None: each row attends to itself, and slot i has position i.
      window_index: index in `spec.windows`, an int or int32[].
      sinks: [H], a score of each head that is in its softmax beside those of the keys, but has no value.

    Raises:
      ValueError: for the implementation "fused" if the mesh does not divide the rows.
    """
    if key_positions is None and _takes_kernel(query, spec):
        return fused.attend_rows(query, key, value, spec, window_index)
    window = _window(spec.windows, window_index)
    if key_positions is not None and _takes_cache_kernel(query, key, spec):
        return cached.attend_cache(query, key, value, _seen(query_positions, key_positions, window)[:, 0], spec)
    batch, length, heads, _ = query.shape
    queries = max(1, _MAX_SCORES // (_local_heads(batch, heads, spec.mesh) * key.shape[2]))  # per row, at a time
    if key_positions is None and _HALVED_FROM <= length <= queries and platform(spec.mesh) == "cpu":
        return _attend_by_halves(query, key, value, query_positions, window, spec, sinks)
    key_positions = query_positions if key_positions is None else key_positions

    def block(query: jax.Array, query_positions: jax.Array) -> jax.Array:
        return _attend(query, key, value, query_positions, key_positions, window, spec, sinks)

    return block(query, query_positions) if length <= queries else _in_chunks(block, query, query_positions, queries)


def _takes_kernel(query: jax.Array, spec: AttentionSpec) -> bool:
    """Whether the fused kernel computes the attention of complete rows `[B, S, H, K]`."""
    rows, length, shards = query.shape[0], query.shape[1], batch_shards(spec.mesh)
    if spec.implementation == "fused" and rows % shards:
        raise ValueError(f"fused attention: {rows} rows do not divide by data x fsdp = {shards} of the mesh")
    long_enough = spec.implementation == "auto" and rows % shards == 0 and length >= fused.SHORTEST
    return long_enough or spec.implementation == "fused"


def _takes_cache_kernel(query: jax.Array, key: jax.Array, spec: AttentionSpec) -> bool:
    """Whether the kernel over a cache computes the attention of one token `[B, 1, H, K]` per row."""
    rows, readable = query.shape[0], query.shape[1] == 1 and cached.block_size(key.shape[2]) is not None
    return spec.over_cache == "fused" and readable and spec.mesh is not None and rows % batch_shards(spec.mesh) == 0


def _seen(query_positions: jax.Array, key_positions: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """bool[B or 1, S, S'], the keys that each query attends to."""
    seen = key_positions[:, None, :] <= query_positions[:, :, None]
    if window is not None:
        seen &= key_positions[:, None, :] > query_positions[:, :, None] - window
    return seen


def _window(windows: tuple[int | None, ...], index: jax.Array | int) -> jax.Array | int | None:
    """The attention window with this index; None if no layer has one."""
    if len(windows) == 1 or isinstance(index, int):
        return windows[index if isinstance(index, int) else 0]
    return jnp.asarray([EMPTY if w is None else w for w in windows], jnp.int32)[index] if any(windows) else None


def _in_chunks(
    block: Callable[[jax.Array, jax.Array], jax.Array], query: jax.Array, query_positions: jax.Array, size: int
) -> jax.Array:
    """Applies `block` to `size` queries of each row at a time; the backward pass recomputes every chunk."""
    batch, length, heads, width = query.shape
    chunks = -(-length // size)
    padding = chunks * size - length
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, padding)))
    query = query.reshape(batch, chunks, size, heads, width).swapaxes(0, 1)
    query_positions = query_positions.reshape(query_positions.shape[0], chunks, size).swapaxes(0, 1)
    out = jax.lax.map(lambda chunk: jax.checkpoint(block)(*chunk), (query, query_positions))
    return out.swapaxes(0, 1).reshape(batch, chunks * size, heads, width)[:, :length]


def _local_heads(batch: int, heads: int, mesh: Mesh | None) -> int:
    """Rows times heads on one chip."""
    if mesh is None:
        return batch * heads
    return -(-batch // batch_shards(mesh)) * (heads // mesh.shape["tensor"])


def _attend_by_halves(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: jax.Array | int | None,
    spec: AttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    """`_attend` of rows to themselves, without products of the first half of queries and the second half of keys."""
    half = query.shape[1] // 2
    early, late = positions[:, :half], positions[:, half:]
    first = _attend(query[:, :half], key[:, :, :half], value[:, :, :half], early, early, window, spec, sinks)
    second = _attend(query[:, half:], key, value, late, positions, window, spec, sinks)
    return jnp.concatenate([first, second], axis=1)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: jax.Array | int | None,
    spec: AttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    batch, length, heads, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, length, groups, heads // groups, width)
    scores = multiply_to_float32("bsgrk,bgtk->bgrst", query, key) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    seen = _seen(query_positions, key_positions, window)
    # A finite minimum: a query without visible keys (padding) gets the mean of all values, not NaN.
    scores = jnp.where(seen[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores, sinks).astype(query.dtype)
    out = einsum("bgrst,bgtk->bgrsk", weights, value)  # batch axes first: ten times faster on a CPU
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)


def _softmax(scores_BGRST: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The softmax over keys; sinks [H] are scores without a key, so that the weights sum to less than 1."""
    if sinks is None:
        return jax.nn.softmax(scores_BGRST, axis=-1)
    of_heads = sinks.astype(jnp.float32).reshape(1, *scores_BGRST.shape[1:3], 1, 1)
    of_keys = jax.nn.logsumexp(scores_BGRST, axis=-1, keepdims=True)
    return jnp.exp(scores_BGRST - jnp.logaddexp(of_keys, of_heads))
