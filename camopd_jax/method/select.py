"""Which answers carry the signal: the smallest set that holds a share of the gap mass (Eq 6-8)."""

import math

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import Phase
from camopd_jax.rollout.masks import row_mean
from camopd_jax.types import Scores, Selection


def absolute_gap(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Eq 6: `s_g(x_i) = 1/T_i sum_t |gap_{i,t}|`, in nats per token."""
    return row_mean(jnp.abs(gap_BT), lengths_B)


def positive_gap(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Eq 7: `s_d(x_i) = 1/T_i sum_t max(gap_{i,t}, 0)`, in nats per token."""
    return row_mean(jnp.maximum(gap_BT, 0), lengths_B)


SCORES = {"absolute_gap": absolute_gap, "positive_gap": positive_gap}


def select(scores: Scores, lengths_B: jax.Array, key: jax.Array, phase: Phase) -> Selection:
    """Keeps the rows of a branch's batch that hold the share `phase.mass` of its gap mass, or a control's choice.

    Args:
      key: of the lot that `phase.keep == "random"` draws.
    """
    score_B = SCORES[phase.score](scores.teacher - scores.student, lengths_B)
    if phase.keep == "fraction":
        return largest_fraction(score_B, phase.mass)
    by_mass = smallest_mass(score_B, phase.mass)
    return random_subset(by_mass, key) if phase.keep == "random" else by_mass


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
    order_B = _by_falling_score(mass_B)
    sums_B = jnp.cumsum(mass_B[order_B])
    # The last sum is the total, so that a share of 1 ends exactly where the mass does.
    reached_B = sums_B >= mass * sums_B[-1]
    count = jnp.where(sums_B[-1] > 0, jnp.argmax(reached_B) + 1, rows).astype(jnp.int32)
    return _first(score_B, order_B, count)


def largest_fraction(score_B: jax.Array, fraction: float) -> Selection:
    """The control of a fixed number: the `ceil(fraction B)` rows of the largest score, whatever their mass."""
    count = jnp.int32(math.ceil(round(fraction * score_B.shape[0], 6)))
    return _first(score_B, _by_falling_score(jnp.where(jnp.isfinite(score_B), score_B, 0)), count)


def random_subset(selection: Selection, key: jax.Array) -> Selection:
    """The control of equal size: as many rows as were selected, drawn by lot."""
    rows = selection.score.shape[0]
    return _first(selection.score, jax.random.permutation(key, rows).astype(jnp.int32), selection.count)


def _by_falling_score(score_B: jax.Array) -> jax.Array:
    return jnp.argsort(-score_B, stable=True).astype(jnp.int32)


def _first(score_B: jax.Array, order_B: jax.Array, count: jax.Array) -> Selection:
    """The first `count` rows of an order."""
    kept = (jnp.arange(score_B.shape[0]) < count).astype(jnp.float32)
    weights_B = jnp.zeros(score_B.shape, jnp.float32).at[order_B].set(kept)
    return Selection(score=score_B, order=order_B, count=count, weights=weights_B)
