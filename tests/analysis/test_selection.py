"""Correlations and statistics of the selection, by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from camopd_jax.analysis import selection

TABLE = {
    "index": [4, 0, 2, 1, 3, 5], "score": [0.1, 0.9, 0.5, 0.3, 0.8, 0.2],
    "selected": [False, True, True, False, True, False],
    "length": [9, 2, 4, 7, 3, 8], "truncated": [True, False, False, True, False, True], "entropy": [1.0] * 6,
    "student_loss": [0.2, 0.1, 0.4, 0.3, 0.6, 0.5], "teacher_loss": [0.1, 0.9, 0.5, 0.3, 0.8, 0.2],
}  # fmt: skip


def test_rank_correlations_of_a_batch():
    measured = selection.correlations(TABLE)
    assert measured["length"] == (-1.0, -1.0, -1.0) and measured["teacher_loss"] == (1.0, 1.0, 1.0)
    assert "entropy" not in measured, "a constant has no correlation"
    # ranks of the gap masses 1 6 4 3 5 2, of the losses 2 1 4 3 6 5: sum of squared differences 1+25+0+0+1+9 = 36
    rho, low, high = measured["student_loss"]
    assert rho == pytest.approx(1 - 6 * 36 / (6 * 35))
    half_width = 1.959964 * np.sqrt((1 + rho**2 / 2) / 3)
    assert (low, high) == pytest.approx((np.tanh(np.arctanh(rho) - half_width), np.tanh(np.arctanh(rho) + half_width)))
    assert measured["truncated"][0] == pytest.approx(stats.spearmanr(TABLE["score"], [1, 0, 0, 1, 0, 1]).statistic)


def test_the_interval_covers_the_true_value_in_95_percent():
    random, covered = np.random.default_rng(3), 0
    for _ in range(400):
        x = random.normal(size=60)
        y = 0.5 * x + np.sqrt(0.75) * random.normal(size=60)
        _, low, high = selection.correlation(x, y)
        covered += low < 6 / np.pi * np.arcsin(0.25) < high  # Spearman's rho of a normal pair with correlation 0.5
    assert 0.92 < covered / 400 < 0.98


def test_a_prompts_source_is_a_feature():
    measured = selection.correlations(TABLE, ["code", "maths", "code", "maths", "maths", "maths"])
    assert measured["source: code"][0] == pytest.approx(
        stats.spearmanr(TABLE["score"], [False, True, True, False, False, False]).statistic
    )
    assert measured["source: maths"][0] == pytest.approx(-measured["source: code"][0])


def test_correlations_are_computed_within_each_step():
    """Gap masses that decrease from step to step are not a correlation."""
    later = TABLE | {"score": [s / 1000 for s in TABLE["score"]], "length": [n * 10 for n in TABLE["length"]]}
    mean, low, high = selection.over_steps([TABLE, later])["length"]
    assert (mean, low, high) == (-1, -1, -1)
    turned = TABLE | {"length": TABLE["length"][::-1]}
    rhos = [selection.correlations(table)["length"][0] for table in (TABLE, turned)]
    mean, low, high = selection.over_steps([TABLE, turned])["length"]
    half_width = 12.706205 * np.std(rhos, ddof=1) / np.sqrt(2)  # t of one degree of freedom
    assert (mean, low, high) == pytest.approx((np.mean(rhos), np.mean(rhos) - half_width, np.mean(rhos) + half_width))
    assert selection.over_steps([TABLE])["length"] == (-1, None, None)


def test_lengths_of_selected_and_all_answers():
    measured = selection.lengths([TABLE, TABLE | {"selected": [True] * 6}])
    assert measured["selected"][0] == pytest.approx((3 + 33 / 6) / 2)
    assert measured["all"] == pytest.approx((33 / 6,) * 3)
    assert measured["difference"][0] == pytest.approx((3 - 33 / 6) / 2)


def test_how_often_prompts_are_selected_again():
    def step(**selected):
        return {"index": [int(name[1:]) for name in selected], "selected": list(selected.values())}

    steps = [step(p1=True, p2=False), step(p1=True, p3=True), step(p1=False, p2=False), step(p2=True, p4=False)]
    measured = selection.repeats(steps)
    assert (measured["prompts"], measured["asked"], measured["selected"]) == (4, 2.0, 1.0)
    assert (measured["never"], measured["always"]) == (0.0, 0.0), "prompts that came once are not counted"
    assert measured["again"][0] == 1 / 2 and measured["anew"][0] == 1 / 2
    assert selection.repeats([step(p1=True)])["again"] is None
    again, low, high = selection.repeats([step(p1=True, p2=True, p3=True, p4=False)] * 3)["again"]
    assert again == 1 and high == 1 and 0.5 < low < 1


def test_selection_rates_of_sources():
    measured = selection.rates_by_source([TABLE, TABLE], ["a", "b", "a", "b", "b", "b"])
    assert measured["a"][0] == 1.0 and measured["b"][0] == 1 / 4
    low, high = stats.binomtest(2, 8).proportion_ci(method="wilson")
    assert measured["b"][1:] == (pytest.approx(low), pytest.approx(high))
