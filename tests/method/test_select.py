"""Selection against a plain loop for Eq 8, and gap masses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.config.schema import SelectionConfig
from camopd_jax.method.select import (
    absolute_gap,
    densest,
    largest_fraction,
    positive_density,
    positive_gap,
    random_subset,
    select,
    smallest_mass,
)
from camopd_jax.types import LogProbs

GAP = jnp.array([[1.0, -3.0, 50.0], [-2.0, 50.0, 50.0]])  # the 50s are padding
LENGTHS = jnp.array([2, 1])
KEY = jax.random.key(0)


def test_gap_masses_by_hand():
    np.testing.assert_allclose(absolute_gap(GAP, LENGTHS), [2.0, 2.0])  # (1 + 3) / 2 and 2 / 1
    np.testing.assert_allclose(positive_gap(GAP, LENGTHS), [0.5, 0.0])  # 1 / 2 and 0


def test_gap_is_teacher_minus_student():
    scores = LogProbs(student=jnp.array([[-1.0], [-3.0]]), teacher=jnp.array([[-3.0], [-1.0]]))
    selection = select(scores, jnp.array([1, 1]), KEY, SelectionConfig("positive_gap", mass=0.8))
    np.testing.assert_array_equal(selection.mass, [0.0, 2.0])
    np.testing.assert_array_equal(selection.weights, [0.0, 1.0])


def test_explorations_are_kept_by_positive_density():
    """By hand, 3 answers to each of 2 prompts; 9s are padding. An exploration as dense as the first is kept.

    Densities: (.2 + .4) / 2 = .3, .5, .25 and 0, 0, .1. Gap masses of the kept rows 0, 1, 3, 4, 5: .5, .5, .3, .4, .1.
    """
    gaps = [[0.2, 0.4, -0.9], [0.5, -0.5, 9], [0.25, 9, 9], [-0.3, -0.3, 9], [-0.4, 9, 9], [0.1, 9, 9]]
    log_probs = LogProbs(student=jnp.zeros((6, 3)), teacher=jnp.array(gaps))
    lengths = jnp.array([3, 2, 1, 2, 1, 1])
    np.testing.assert_allclose(positive_density(log_probs.gap, lengths), [0.3, 0.5, 0.25, 0, 0, 0.1], rtol=1e-6)
    chosen = select(log_probs, lengths, KEY, SelectionConfig("absolute_gap", 0.1, keep="density"), 3)
    np.testing.assert_array_equal(chosen.weights, [1, 1, 0, 1, 1, 1])
    assert chosen.count == 5
    np.testing.assert_allclose(chosen.mass[chosen.order], [0.5, 0.5, 0.4, 0.3, 0.1, 0.25], rtol=1e-6)


def test_an_answer_with_a_density_that_is_not_finite_is_kept():
    """So that the update skips the step, instead of a batch without the first answer."""
    for spoiled in ([jnp.nan, 0.1], [0.1, jnp.nan]):
        np.testing.assert_array_equal(densest(jnp.ones(2), jnp.array(spoiled), 2).weights, [1, 1])


def loop(masses: list[int], percent: int) -> tuple[list[int], int]:
    """Eq 8 with integers: rows by descending gap mass, and the smallest k whose sum reaches the share."""
    order = sorted(range(len(masses)), key=lambda row: (-masses[row], row))
    total, so_far = sum(masses), 0
    for k, row in enumerate(order, 1):
        so_far += masses[row]
        if 100 * so_far >= percent * total and total:
            return order, k
    return order, len(masses)


@pytest.mark.parametrize("percent", [25, 50, 75, 100])
def test_selection_equals_a_loop(percent):
    """4 x 1,000 batches of small integers: many ties and zeros; sums and shares are exact in float32."""
    rng = np.random.default_rng(percent)
    cases = rng.integers(0, 8, (1000, 11)) * rng.integers(0, 2, (1000, 11))
    cases[0] = 0
    got = jax.jit(jax.vmap(lambda s: smallest_mass(s, percent / 100)))(jnp.asarray(cases, jnp.float32))
    for i, case in enumerate(cases.tolist()):
        order, count = loop(case, percent)
        assert got.order[i].tolist() == order
        assert got.count[i] == count
        assert np.flatnonzero(got.weights[i]).tolist() == sorted(order[:count])


def test_the_selection_has_the_share_and_is_minimal():
    rng = np.random.default_rng(0)
    cases = rng.exponential(1, (500, 64)).astype(np.float32)
    got = jax.vmap(lambda s: smallest_mass(s, 0.8))(jnp.asarray(cases))
    for case, weights in zip(cases.astype(np.float64), np.asarray(got.weights), strict=True):
        kept = np.sort(case[weights > 0])
        assert kept.sum() >= 0.8 * case.sum() * (1 - 1e-6)
        assert kept[1:].sum() < 0.8 * case.sum() * (1 + 1e-6)
        assert kept[0] >= case[weights == 0].max()


def test_all_zero_keeps_all():
    selection = smallest_mass(jnp.zeros(5), 0.8)
    assert selection.count == 5
    np.testing.assert_array_equal(selection.weights, 1)


def test_a_gap_mass_that_is_not_finite_is_ranked_last():
    selection = smallest_mass(jnp.array([jnp.nan, 4.0, jnp.inf, 1.0]), 0.8)
    assert selection.order.tolist() == [1, 3, 0, 2]
    assert selection.count == 1
    assert np.isnan(selection.mass[0])  # and the update sees it


def test_the_published_example_of_both_branches():
    """Eq 6 to 8 on four answers: gaps [-2,0,0,0], [.5,-.5,.5,-.5], [.1,.1], [1,-.2,.3]."""
    gaps = jnp.array([[-2.0, 0, 0, 0], [0.5, -0.5, 0.5, -0.5], [0.1, 0.1, 9, 9], [1, -0.2, 0.3, 9]])
    lengths = jnp.array([4, 4, 2, 3])
    log_probs = LogProbs(jnp.zeros((4, 4)), gaps)
    recovery = select(log_probs, lengths, KEY, SelectionConfig("absolute_gap", 0.8))
    np.testing.assert_allclose(recovery.mass, [0.5, 0.5, 0.1, 0.5], rtol=1e-6)
    assert recovery.order.tolist() == [0, 1, 3, 2] and recovery.weights.tolist() == [1, 1, 0, 1]
    review = select(log_probs, lengths, KEY, SelectionConfig("positive_gap", 0.8))
    np.testing.assert_allclose(review.mass, [0, 0.25, 0.1, 1.3 / 3], rtol=1e-6)
    assert review.order.tolist() == [3, 1, 2, 0] and review.weights.tolist() == [0, 1, 0, 1]


# -------------------------------------------------------------------------------- rules for comparison

MASS = jnp.array([1.0, 6.0, 0.0, 3.0, 0.5])


@pytest.mark.parametrize(
    "fraction, kept", [(0.2, [1]), (0.4, [1, 3]), (0.41, [0, 1, 3]), (0.6, [0, 1, 3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_a_fixed_fraction_keeps_the_largest_gap_masses(fraction, kept):
    selection = largest_fraction(MASS, fraction)
    assert np.flatnonzero(selection.weights).tolist() == kept and selection.count == len(kept)
    assert sorted(selection.order[: len(kept)].tolist()) == kept
    assert largest_fraction(jnp.array([jnp.nan, 1.0]), 0.5).weights.tolist() == [0, 1]


def test_random_subsets_have_the_same_size_and_different_rows():
    by_mass = smallest_mass(jnp.arange(1.0, 65.0), 0.8)
    drawn = [random_subset(by_mass, jax.random.key(seed)) for seed in range(200)]
    for selection in drawn:
        assert selection.count == by_mass.count == jnp.sum(selection.weights)
        assert sorted(selection.order.tolist()) == list(range(64))
        np.testing.assert_array_equal(np.sort(selection.order[: selection.count]), np.flatnonzero(selection.weights))
        np.testing.assert_array_equal(selection.mass, by_mass.mass)
    frequency = np.mean([selection.weights for selection in drawn], axis=0)
    np.testing.assert_allclose(frequency, int(by_mass.count) / 64, atol=0.15)


def test_select_follows_the_rule():
    scores = LogProbs(student=jnp.zeros((5, 1)), teacher=MASS[:, None])
    kept = {
        keep: select(scores, jnp.ones(5, jnp.int32), KEY, SelectionConfig("absolute_gap", 0.8, keep=keep)).count.item()
        for keep in ("mass", "fraction", "random")
    }
    assert kept == {"mass": 2, "fraction": 4, "random": 2}
