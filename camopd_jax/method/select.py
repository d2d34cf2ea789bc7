"""Selects the answers to train on: the smallest set that has a given share of the gap mass (Eq 6-8)."""

import math

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import SelectionConfig
from camopd_jax.rollout.masks import length_mask, row_mean
from camopd_jax.types import LogProbs, Selection


def absolute_gap(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Eq 6: `s_g(x_i) = 1/T_i sum_t |gap_{i,t}|`, in nats per token."""
    return row_mean(jnp.abs(gap_BT), lengths_B)


def positive_gap(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Eq 7: `s_d(x_i) = 1/T_i sum_t max(gap_{i,t}, 0)`, in nats per token."""
    return row_mean(jnp.maximum(gap_BT, 0), lengths_B)


GAP_MASS = {"absolute_gap": absolute_gap, "positive_gap": positive_gap}


def select(
    log_probs: LogProbs, lengths_B: jax.Array, key: jax.Array, rule: SelectionConfig, answers: int = 1
) -> Selection:
    """Selects answers of a branch's batch as `rule` says.

    Args:
      key: for the random choice of `rule.keep == "random"`.
      answers: consecutive rows that answer one prompt.
    """
    mass_B = GAP_MASS[rule.by](log_probs.gap, lengths_B)
    if rule.keep == "fraction":
        return largest_fraction(mass_B, rule.mass)
    if rule.keep == "density":
        return densest(mass_B, positive_density(log_probs.gap, lengths_B), answers)
    by_mass = smallest_mass(mass_B, rule.mass)
    return random_subset(by_mass, key) if rule.keep == "random" else by_mass


def smallest_mass(mass_B: jax.Array, share: float) -> Selection:
    """Eq 8: sort rows by descending gap mass s; `k = min{k : sum_{j<=k} s_(j) / sum_j s_(j) >= share}`; keep k rows.

    If every gap mass is 0, as in a review step before any recovery step, all rows are kept. A gap mass that is not
    finite counts as 0, so that its row comes last; the update then skips the step.

    >>> smallest_mass(jnp.array([1.0, 6.0, 0.0, 3.0]), 0.8).weights
    Array([0., 1., 0., 1.], dtype=float32)
    """
    finite_B = jnp.where(jnp.isfinite(mass_B), mass_B, 0)
    order_B = _by_falling_mass(finite_B)
    sums_B = jnp.cumsum(finite_B[order_B])
    # The last cumulative sum is used as the total, so that rounding cannot change the result for a share of 1.
    reached_B = sums_B >= share * sums_B[-1]
    count = jnp.where(sums_B[-1] > 0, jnp.argmax(reached_B) + 1, len(mass_B)).astype(jnp.int32)
    return _first(mass_B, order_B, count)


def largest_fraction(mass_B: jax.Array, fraction: float) -> Selection:
    """For comparison: a fixed number of rows, the `ceil(fraction B)` rows with the largest gap mass."""
    count = jnp.int32(math.ceil(round(fraction * mass_B.shape[0], 6)))
    return _first(mass_B, _by_falling_mass(jnp.where(jnp.isfinite(mass_B), mass_B, 0)), count)


def random_subset(selection: Selection, key: jax.Array) -> Selection:
    """For comparison: the same number of rows as `selection` has, chosen at random."""
    order_B = jax.random.permutation(key, len(selection.mass)).astype(jnp.int32)
    return _first(selection.mass, order_B, selection.count)


def positive_density(gap_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The mean of an answer's positive gaps in nats, 0 if it has none (UC-MOPD, arXiv 2608.26735)."""
    positive_BT = length_mask(lengths_B, gap_BT.shape[1]) & (gap_BT > 0)
    return jnp.sum(jnp.where(positive_BT, gap_BT, 0), axis=1) / jnp.maximum(jnp.sum(positive_BT, axis=1), 1)


def densest(mass_B: jax.Array, density_B: jax.Array, answers: int) -> Selection:
    """UC-MOPD: of the answers to each prompt, the first, and those whose density is not below that of the first.

    >>> densest(jnp.array([1.0, 6.0, 0.0, 3.0]), jnp.array([0.2, 0.1, 0.3, 0.3]), 2).weights
    Array([1., 0., 1., 1.], dtype=float32)
    """
    first_B = jnp.repeat(density_B[::answers], answers, total_repeat_length=len(density_B))
    kept_B = ~(density_B < first_B)  # the first itself, too, and what is not finite: the update then skips the step
    order_B = _by_falling_mass(jnp.where(jnp.isfinite(mass_B), mass_B, 0))
    order_B = order_B[jnp.argsort(~kept_B[order_B], stable=True)]
    return _first(mass_B, order_B, jnp.sum(kept_B).astype(jnp.int32))


def among_first(selection: Selection, rows: jax.Array) -> Selection:
    """The selected answers that are among the first `rows` of the batch; there may be none."""
    kept_B = (selection.weights > 0) & (jnp.arange(len(selection.mass)) < rows)
    order_B = selection.order[jnp.argsort(~kept_B[selection.order], stable=True)]
    return _first(selection.mass, order_B, jnp.sum(kept_B).astype(jnp.int32))


def _by_falling_mass(mass_B: jax.Array) -> jax.Array:
    return jnp.argsort(-mass_B, stable=True).astype(jnp.int32)


def _first(mass_B: jax.Array, order_B: jax.Array, count: jax.Array) -> Selection:
    """Selects the first `count` rows of an order."""
    kept = (jnp.arange(len(mass_B)) < count).astype(jnp.float32)
    weights_B = jnp.zeros(mass_B.shape, jnp.float32).at[order_B].set(kept)
    return Selection(mass=mass_B, order=order_B, count=count, weights=weights_B)
