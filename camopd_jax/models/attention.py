"""Attention, in one function: a fused kernel for a platform has its place here and nowhere else."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.sharding import batch_shards

# Scores of at most this many query-key pairs (all rows and heads of one chip) exist at one time.
_MAX_SCORES = 2**26


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    window: jax.Array | int | None,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Softmax attention of grouped heads, `[B, S, H, K]`.

    A query sees the keys at its own and earlier positions, at most `window` of them. Positions are all
    the mask there is: an EMPTY slot lies later than any query.

    Args:
      query: [B, S, H, K].
      key, value: [B, G, S', K], heads first as a cache holds them: no step of decoding transposes it. G divides H.
      query_positions: int32[B or 1, S].
      key_positions: int32[B or 1, S'].
      window: a number or int32[]; None where every layer sees everything.
      scale: factor on q.k, before `softcap * tanh(scores / softcap)`.
      mesh: what rows and heads are split over; None: one device.
    """
    batch, length, heads, width = query.shape
    rows = max(1, _MAX_SCORES // (_share(batch, heads, mesh) * key.shape[2]))

    def block(query: jax.Array, query_positions: jax.Array) -> jax.Array:
        return _attend(query, key, value, query_positions, key_positions, window, scale, softcap)

    if length <= rows:
        return block(query, query_positions)
    # Too many scores for one piece: queries in chunks, each computed again in the backward pass.
    chunks = -(-length // rows)
    padding = chunks * rows - length
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, padding)))
    query = query.reshape(batch, chunks, rows, heads, width).swapaxes(0, 1)
    query_positions = query_positions.reshape(query_positions.shape[0], chunks, rows).swapaxes(0, 1)
    out = jax.lax.map(lambda chunk: jax.checkpoint(block)(*chunk), (query, query_positions))
    return out.swapaxes(0, 1).reshape(batch, chunks * rows, heads, width)[:, :length]


def _share(batch: int, heads: int, mesh: Mesh | None) -> int:
    """Rows times heads that one chip holds."""
    if mesh is None:
        return batch * heads
    return -(-batch // batch_shards(mesh)) * (heads // mesh.shape["tensor"])


def _attend(query, key, value, query_positions, key_positions, window, scale, softcap) -> jax.Array:
    batch, length, heads, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("bsgrk,bgtk->bgrst", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = key_positions[:, None, :] <= query_positions[:, :, None]
    if window is not None:
        seen &= key_positions[:, None, :] > query_positions[:, :, None] - window
    # A finite floor: a query that sees nothing (padding) gets a mean, not NaN.
    scores = jnp.where(seen[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bgrst,bgtk->bgrsk", weights, value)  # batch axes in front: ten times faster on a CPU
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)
