"""Which answers carry the signal: the smallest set that holds a share of the gap mass (Eq 6-8)."""

import jax
import jax.numpy as jnp

from camopd_jax.config import Phase
from camopd_jax.masked import row_mean
from camopd_jax.types import Scores, Selection


def absolute_gap(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Eq 6: `s_g(x_i) = 1/T_i sum_t |gap_{i,t}|`, in nats per token."""
    return row_mean(jnp.abs(gap_BT), lengths_B)


def positive_gap(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Eq 7: `s_d(x_i) = 1/T_i sum_t max(gap_{i,t}, 0)`, in nats per token."""
    return row_mean(jnp.maximum(gap_BT, 0), lengths_B)


SCORES = {"absolute_gap": absolute_gap, "positive_gap": positive_gap}


def select(scores: Scores, lengths_B: jax.Array, phase: Phase) -> Selection:
    """Keeps the rows of a branch's batch that hold the share `phase.mass` of its gap mass."""
    return smallest_mass(SCORES[phase.score](scores.teacher - scores.student, lengths_B), phase.mass)


def smallest_mass(score_B: jax.Array, mass: float) -> Selection:
    """Eq 8: rows by falling score; `k = min{k : sum_{j<=k} s_(j) / sum_j s_(j) >= mass}`; the first k.

    Row number k is kept when the rows before it hold less than the share. All scores 0, as in a review
    before any recovery: all rows are kept. A score that is not finite counts as 0 here, and its row is
    ranked last; the update's own check then sees to the step.

    >>> smallest_mass(jnp.array([1.0, 6.0, 0.0, 3.0]), 0.8).weights
    Array([0., 1., 0., 1.], dtype=float32)
    """
    rows = score_B.shape[0]
    mass_B = jnp.where(jnp.isfinite(score_B), score_B, 0)
    order_B = jnp.argsort(-mass_B, stable=True).astype(jnp.int32)
    sums_B = jnp.cumsum(mass_B[order_B])
    # The last sum is the total, so that a share of 1 ends exactly where the mass does.
    reached_B = sums_B >= mass * sums_B[-1]
    count = jnp.where(sums_B[-1] > 0, jnp.argmax(reached_B) + 1, rows).astype(jnp.int32)
    weights_B = jnp.zeros((rows,), jnp.float32).at[order_B].set((jnp.arange(rows) < count).astype(jnp.float32))
    return Selection(score=score_B, order=order_B, count=count, weights=weights_B)
