"""Comparisons of methods: shares on separate questions, paired tests by hand, and the table."""

import math

import pytest
from rich.console import Console
from scipy import stats

from camopd_jax.analysis import study


def result(name, axis, scores):
    return {"benchmark": name, "axis": axis, "accuracy": sum(scores) / len(scores), "standard_error": 0.0,
            "n": len(scores), "scores": scores}  # fmt: skip


def test_tuning_and_results_share_no_question():
    numbers = range(40)
    assert sum(map(study.is_tuning_question, numbers)) == 10
    general, specialised = [1] * 8, [0] * 8
    student = [1, 0, 0, 0, 1, 1, 1, 1]  # questions 0 and 4 tune
    models = [[result("a", "general", scores)] for scores in (general, specialised, student)]
    assert study.shares(models, for_tuning=True) == {"a": 1.0}
    assert study.shares(models, for_tuning=False) == {"a": pytest.approx(3 / 6)}


def test_the_share_of_a_domain_benchmark_is_retention():
    models = [[result("d", "domain", scores)] for scores in ([0] * 4, [0, 1, 1, 0], [0, 1, 0, 0])]
    assert study.shares(models, for_tuning=False) == {"d": 0.5}
    assert math.isnan(study.shares([models[0]] * 3, for_tuning=False)["d"]), "there was nothing to keep"


def test_merit_weighs_both_axes_equally():
    axes = {"a": "general", "b": "general", "d": "domain"}
    assert study.merit({"a": 0.2, "b": 0.6, "d": 1.0}, axes) == pytest.approx((0.4 + 1.0) / 2)


def test_means_and_paired_differences_by_hand():
    assert study.mean([0.5]) == study.Mean(0.5, None, 1)
    mean = study.mean([0.1, 0.3, 0.5])
    assert (mean.value, mean.error) == (pytest.approx(0.3), pytest.approx(0.2 / math.sqrt(3)))
    first, second = {0: 0.5, 1: 0.7, 2: 0.9, 9: 1.0}, {0: 0.4, 1: 0.5, 2: 0.6, 3: 0.0}
    apart = study.difference(first, second)  # 0.1, 0.2, 0.3 on the seeds of both
    assert apart.value == pytest.approx(0.2) and apart.error == pytest.approx(0.1 / math.sqrt(3))
    assert apart.p == pytest.approx(2 * stats.t.sf(0.2 / apart.error, 2))
    assert apart.p == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.3], 0).pvalue)
    assert study.half_width(0.1, 5) == pytest.approx(0.1 * stats.t.ppf(0.975, 4))
    assert study.difference({0: 1.0}, {0: 0.5}) is None
    assert study.difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).p is None, "without spread no test"


def test_the_seconds_of_a_run_leave_out_compilation_by_hand():
    """Recovery 2, 2, 50 (it compiles) and review 5, 7 seconds: 3 x 2 + 2 x 6."""
    steps = [
        {"phase": phase, "response_tokens": 10, "seconds": {"rollout": 1.0, "update": seconds - 1}}
        for phase, seconds in (("recovery", 50), ("recovery", 2), ("recovery", 2), ("review", 5), ("review", 7))
    ]
    assert study.run_seconds(steps) == pytest.approx(18) and study.sampled_tokens(steps) == 50


def printed(outcomes, width=100):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(
            study.methods_table(outcomes, {"a": "general", "d": "domain"}, ("vanilla", "camopd"), {"camopd": "0.1"})
        )
    return captured.get()


def test_the_table_marks_significant_differences():
    outcomes = {
        "camopd": {seed: {"a": 0.5 + 0.01 * seed, "d": 0.9} for seed in range(5)},
        "vanilla": {seed: {"a": 0.2 + 0.01 * seed + 0.001 * (seed % 2), "d": 0.9 + 0.02 * (-1) ** seed}
                    for seed in range(5)},
    }  # fmt: skip
    lines = printed(outcomes).splitlines()
    below = {
        name: (line, lines[i + 1])
        for i, line in enumerate(lines)
        for name in outcomes
        if line.strip().startswith(name) and "±" in line
    }
    assert "52.0 ± 0.7" in below["camopd"][0] and "90.0 ± 0.0" in below["camopd"][0] and "0.1" in below["camopd"][0]
    assert below["camopd"][1].split() == ["+30.0**", "-", "-0.4", "-"]
    assert below["vanilla"][1].split() == ["-", "-30.0**", "-", "+0.4"]


def test_no_line_of_the_table_is_longer_than_a_terminal():
    outcomes = {
        name: {0: {"a": 0.5, "d": 0.9}, 1: {"a": 0.4, "d": 0.8}} for name in ("camopd", "vanilla", "a-long-name")
    }
    assert max(map(len, printed(outcomes, 80).splitlines())) <= 80 and "a-long-name" in printed(outcomes, 80)
