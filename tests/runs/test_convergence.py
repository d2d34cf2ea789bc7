"""The note at the end of a run whose gap still falls."""

import numpy as np
import pytest

from camopd_jax.runs.convergence import not_converged

NOISE = np.tile([0.01, -0.01, 0.02, -0.02], 5)


def rows(gaps, phase="recovery"):
    return [{"phase": phase, "gap_abs_mean": float(gap)} for gap in gaps]


def test_the_fall_over_the_last_fifth():
    """50 steps: the fifth before the last has a mean gap of 0.5, the last one of 0.44. Other phases do not count."""
    gaps = np.concatenate([np.full(30, 0.9), np.full(10, 0.5), np.full(10, 0.44)])
    metrics = rows([5.0] * 20, "warm_up/recovery") + rows(gaps) + rows([0.3] * 50, "review")
    line = "not converged: mean |gap| of recovery fell 12 % over the last fifth of its steps; raise config.steps"
    assert not_converged(metrics, ["recovery", "review"]) == [line]
    mixed = [{"phase": "mixed", "recovery": {"gap_abs_mean": gap}, "review": {"gap_abs_mean": None}} for gap in gaps]
    assert not_converged(mixed, ["recovery", "review"]) == [line]


@pytest.mark.parametrize(
    "last, fell",
    [(0.5, False), (0.6, False), (0.49, False), (0.47, True)],
)
def test_a_fall_within_the_noise_is_none(last, fell):
    """The standard error of the difference of two means of ten such steps is about 0.007."""
    gaps = np.concatenate([np.full(30, 0.9), 0.5 + NOISE[:10], last + NOISE[10:20]])
    assert bool(not_converged(rows(gaps), ["recovery"])) == fell


def test_few_steps_say_nothing():
    assert not not_converged(rows(np.linspace(1, 0, 19)), ["recovery"])
    assert not_converged(rows(np.linspace(1, 0, 20)), ["recovery"])
