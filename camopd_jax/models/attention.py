"""Attention, in one function: a fused kernel for a platform has its place here and nowhere else."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Scores of at most this many query-key pairs (all rows and heads) exist at one time.
_MAX_SCORES = 2**26


def attend(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    query_positions: jax.Array,
    key_positions: Sequence[jax.Array],
    *,
    window: jax.Array | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Softmax attention of grouped heads over one or more blocks of keys, `[B, S, H, K]`.

    A query sees the keys at its own and earlier positions, at most `window` of them. Positions are all
    the mask there is: an EMPTY slot lies later than any query. Several blocks spare a copy: decoding
    attends over the cache and the new token's own key without joining them.

    Args:
      query: [B, S, H, K].
      keys, values: blocks of [B, S', G, K]; G divides H.
      query_positions: int32[B or 1, S].
      key_positions: for each block, int32[B or 1, S'].
      window: int32[], or None where every layer sees everything.
      scale: factor on q.k, before `softcap * tanh(scores / softcap)`.
    """
    batch, length, heads, width = query.shape
    per_query = batch * heads * sum(k.shape[1] for k in keys)
    rows = max(1, _MAX_SCORES // per_query)

    def block(query: jax.Array, query_positions: jax.Array) -> jax.Array:
        return _attend(query, keys, values, query_positions, key_positions, window, scale, softcap)

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


def _attend(query, keys, values, query_positions, key_positions, window, scale, softcap) -> jax.Array:
    batch, length, heads, width = query.shape
    groups = keys[0].shape[2]
    query = query.reshape(batch, length, groups, heads // groups, width)
    scores = []
    for key, position in zip(keys, key_positions, strict=True):
        score = jnp.einsum("bsgrk,btgk->bgrst", query, key, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        seen = position[:, None, :] <= query_positions[:, :, None]
        if window is not None:
            seen &= position[:, None, :] > query_positions[:, :, None] - window
        # A finite floor: a query that sees nothing (padding) gets a mean, not NaN.
        scores.append(jnp.where(seen[:, None, None, :, :], score, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    splits = [sum(k.shape[1] for k in keys[: i + 1]) for i in range(len(keys) - 1)]
    out = sum(
        jnp.einsum("bgrst,btgk->bsgrk", part, value)
        for part, value in zip(jnp.split(weights, splits, axis=-1), values, strict=True)
    )
    return out.reshape(batch, length, heads, width)
