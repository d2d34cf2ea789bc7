"""What a selection follows, by hand and by scipy's own words."""

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
    found = selection.correlations(TABLE)
    assert found["length"] == (-1.0, -1.0, -1.0) and found["teacher_loss"] == (1.0, 1.0, 1.0)
    assert "entropy" not in found, "what does not vary correlates with nothing"
    # ranks of the scores 1 6 4 3 5 2, of the losses 2 1 4 3 6 5: sum of squared differences 1+25+0+0+1+9 = 36
    rho, low, high = found["student_loss"]
    assert rho == pytest.approx(1 - 6 * 36 / (6 * 35))
    reach = 1.959964 * np.sqrt((1 + rho**2 / 2) / 3)
    assert (low, high) == pytest.approx((np.tanh(np.arctanh(rho) - reach), np.tanh(np.arctanh(rho) + reach)))
    assert found["truncated"][0] == pytest.approx(stats.spearmanr(TABLE["score"], [1, 0, 0, 1, 0, 1]).statistic)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random, held = np.random.default_rng(3), 0
    for _ in range(400):
        x = random.normal(size=60)
        y = 0.5 * x + np.sqrt(0.75) * random.normal(size=60)
        _, low, high = selection.correlation(x, y)
        held += low < 6 / np.pi * np.arcsin(0.25) < high  # Spearman's rho of a normal pair with correlation 0.5
    assert 0.92 < held / 400 < 0.98


def test_a_prompts_source_is_a_feature():
    found = selection.correlations(TABLE, ["code", "maths", "code", "maths", "maths", "maths"])
    assert found["source: code"][0] == pytest.approx(
        stats.spearmanr(TABLE["score"], [False, True, True, False, False, False]).statistic
    )
    assert found["source: maths"][0] == pytest.approx(-found["source: code"][0])


def test_over_steps_ranks_within_each_step():
    """Scores that fall from step to step are no correlation."""
    later = TABLE | {"score": [s / 1000 for s in TABLE["score"]], "length": [n * 10 for n in TABLE["length"]]}
    mean, low, high = selection.over_steps([TABLE, later])["length"]
    assert (mean, low, high) == (-1, -1, -1)
    turned = TABLE | {"length": TABLE["length"][::-1]}
    rhos = [selection.correlations(table)["length"][0] for table in (TABLE, turned)]
    mean, low, high = selection.over_steps([TABLE, turned])["length"]
    reach = 12.706205 * np.std(rhos, ddof=1) / np.sqrt(2)  # t of one degree of freedom
    assert (mean, low, high) == pytest.approx((np.mean(rhos), np.mean(rhos) - reach, np.mean(rhos) + reach))
    assert selection.over_steps([TABLE])["length"] == (-1, None, None)


def test_lengths_of_the_selected_against_all():
    found = selection.lengths([TABLE, TABLE | {"selected": [True] * 6}])
    assert found["selected"][0] == pytest.approx((3 + 33 / 6) / 2)
    assert found["all"] == pytest.approx((33 / 6,) * 3)
    assert found["difference"][0] == pytest.approx((3 - 33 / 6) / 2)


def test_how_often_prompts_are_selected_again():
    def step(**selected):
        return {"index": [int(name[1:]) for name in selected], "selected": list(selected.values())}

    steps = [step(p1=True, p2=False), step(p1=True, p3=True), step(p1=False, p2=False), step(p2=True, p4=False)]
    found = selection.repeats(steps)
    assert (found["prompts"], found["asked"], found["selected"]) == (4, 2.0, 1.0)
    assert (found["never"], found["always"]) == (0.0, 0.0), "prompts asked once are not counted"
    assert found["again"][0] == 1 / 2 and found["anew"][0] == 1 / 2
    assert selection.repeats([step(p1=True)])["again"] is None
    again, low, high = selection.repeats([step(p1=True, p2=True, p3=True, p4=False)] * 3)["again"]
    assert again == 1 and high == 1 and 0.5 < low < 1


def test_selection_rates_of_sources():
    found = selection.rates_by_source([TABLE, TABLE], ["a", "b", "a", "b", "b", "b"])
    assert found["a"][0] == 1.0 and found["b"][0] == 1 / 4
    low, high = stats.binomtest(2, 8).proportion_ci(method="wilson")
    assert found["b"][1:] == (pytest.approx(low), pytest.approx(high))
