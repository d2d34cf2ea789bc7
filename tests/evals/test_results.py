"""The result of a model on a benchmark, computed by hand."""

import math

import pytest
from results import scored

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals.results import axis_mean, on_questions, summarise
from camopd_jax.evals.task import Grade


def test_a_result_by_hand():
    grades = [Grade(1.0), Grade(0.0, marked=False), Grade(1.0), Grade(1.0)]
    row = summarise(Benchmark("sums", "exact"), [[g] for g in grades], [1, 2, 3, 6], [True, True, True, False])
    assert row["accuracy"] == 0.75 and row["n"] == 4 and row["length_mean"] == 3
    assert row["truncated"] == 0.25 and row["unmarked"] == 0.25 and row["scores"] == [1, 0, 1, 1]
    assert row["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_the_mean_of_n_answers_has_its_error_over_questions():
    """Two questions with four answers each, 3/4 and 1/4 right. The error is that of two numbers, not of eight."""
    grades = [[Grade(float(x)) for x in answers] for answers in ((1, 1, 1, 0), (0, 1, 0, 0))]
    benchmark = Benchmark("sums", samples=4, temperature=0.7, top_p=0.9)
    row = summarise(benchmark, grades, [1] * 8, [True] * 8)
    assert row["scores"] == [0.75, 0.25] and row["accuracy"] == 0.5
    assert row["standard_error"] == pytest.approx(0.5 / math.sqrt(2) / math.sqrt(2))
    assert (row["samples"], row["temperature"], row["top_p"], row["top_k"]) == (4, 0.7, 0.9, 0)


def test_parts_are_pooled_over_answers():
    grades = [[Grade(0.0, parts={"cells": (1, 4)})], [Grade(1.0, parts={"cells": (8, 8)})], [Grade(0.0)]]
    assert summarise(Benchmark("z"), grades, [1] * 3, [True] * 3)["parts"] == {"cells": 9 / 12}


def test_accuracy_on_some_questions():
    row = on_questions(scored([1, 1, 0, 0]), range(2))
    assert (row["accuracy"], row["n"], row["standard_error"]) == (1.0, 2, 0.0)
    assert on_questions(scored([1, 1, 0, 0]), [1, 3])["scores"] == [1, 0]


def test_axis_mean_and_its_error():
    rows = [
        {"axis": axis, "accuracy": a, "standard_error": e}
        for axis, a, e in (("general", 0.5, 0.03), ("general", 0.7, 0.04), ("domain", 0.1, 0.01))
    ]
    assert axis_mean(rows, "general") == (pytest.approx(0.6), pytest.approx(0.025))
    assert axis_mean(rows[:2], "domain") is None
