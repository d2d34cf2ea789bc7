"""Scores, recovery and retention by hand, and which checkpoint is best."""

import io
import itertools
import math

import numpy as np
import pytest
from rich.console import Console

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals import scores
from camopd_jax.evals.scores import Standing
from camopd_jax.evals.task import Grade


def scored(scores, name="sums", axis="general"):
    grades = [[Grade(float(s))] for s in scores]
    return scores.result(Benchmark(name, axis=axis), grades, [1] * len(grades), [True] * len(grades))


def test_a_result_by_hand():
    grades = [Grade(1.0), Grade(0.0, marked=False), Grade(1.0), Grade(1.0)]
    row = scores.result(Benchmark("sums", "exact"), [[g] for g in grades], [1, 2, 3, 6], [True, True, True, False])
    assert row["accuracy"] == 0.75 and row["n"] == 4 and row["length_mean"] == 3
    assert row["truncated"] == 0.25 and row["unmarked"] == 0.25 and row["scores"] == [1, 0, 1, 1]
    assert row["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_the_mean_of_n_answers_has_its_error_over_questions():
    """Two questions of four answers: 3/4 and 1/4 right. The error is of those two numbers, not of eight."""
    grades = [[Grade(float(x)) for x in answers] for answers in ((1, 1, 1, 0), (0, 1, 0, 0))]
    benchmark = Benchmark("sums", samples=4, temperature=0.7, top_p=0.9)
    row = scores.result(benchmark, grades, [1] * 8, [True] * 8)
    assert row["scores"] == [0.75, 0.25] and row["accuracy"] == 0.5
    assert row["standard_error"] == pytest.approx(0.5 / math.sqrt(2) / math.sqrt(2))
    assert (row["samples"], row["temperature"], row["top_p"], row["top_k"]) == (4, 0.7, 0.9, 0)


def test_parts_are_pooled_over_answers():
    grades = [[Grade(0.0, parts={"cells": (1, 4)})], [Grade(1.0, parts={"cells": (8, 8)})], [Grade(0.0)]]
    assert scores.result(Benchmark("z"), grades, [1] * 3, [True] * 3)["parts"] == {"cells": 9 / 12}


def test_some_of_the_questions_alone():
    row = scores.some(scored([1, 1, 0, 0]), range(2))
    assert (row["accuracy"], row["n"], row["standard_error"]) == (1.0, 2, 0.0)
    assert scores.some(scored([1, 1, 0, 0]), [1, 3])["scores"] == [1, 0]


def test_axis_mean_and_its_error():
    rows = [{"axis": axis, "accuracy": a, "standard_error": e}
            for axis, a, e in (("general", 0.5, 0.03), ("general", 0.7, 0.04), ("domain", 0.1, 0.01))]  # fmt: skip
    assert scores.axis_mean(rows, "general") == (pytest.approx(0.6), pytest.approx(0.025))
    assert scores.axis_mean(rows[:2], "domain") is None


# ------------------------------------------------------------------------ recovery and retention


def test_recovery_and_retention_by_hand():
    general, specialised, student = scored([1, 1, 1, 1, 0]), scored([0, 0, 0, 1, 0]), scored([1, 1, 0, 1, 0])
    share = scores.recovery([general], [specialised], [student])
    assert share.value == pytest.approx((0.6 - 0.2) / (0.8 - 0.2))
    residuals = [1 - 2 / 3, 1 - 2 / 3, -2 / 3, 0, 0]
    assert share.error == pytest.approx(np.std(residuals, ddof=1) / math.sqrt(5) / 0.6)
    share = scores.retention([specialised], [student])
    assert share.value == pytest.approx(3.0)
    assert share.error == pytest.approx(np.std([1, 1, 0, -2, 0], ddof=1) / math.sqrt(5) / 0.2)


def test_what_was_not_lost_cannot_come_back():
    same = scored([1, 0])
    assert scores.recovery([same], [same], [scored([1, 1])]) is None
    assert scores.retention([scored([0, 0])], [same]) is None
    assert scores.recovery([], [], []) is None


def test_a_student_that_equals_a_teacher_has_no_error():
    """Paired by question: the questions' own spread cancels."""
    general, specialised = scored([1, 1, 1, 0]), scored([1, 0, 0, 0])
    assert scores.recovery([general], [specialised], [general]) == scores.Share(1.0, 0.0)
    assert scores.recovery([general], [specialised], [specialised]) == scores.Share(0.0, 0.0)
    assert scores.retention([specialised], [specialised]) == scores.Share(1.0, 0.0)


def test_the_error_of_a_recovery_is_its_spread_over_draws_of_questions():
    rng = np.random.default_rng(0)

    def draw():
        u = rng.random(400)
        answers = [scored((u + 0.3 * rng.random(400) < p).astype(float)) for p in (0.9, 0.4, 0.7)]
        return scores.recovery(*([a] for a in answers))

    shares = [draw() for _ in range(300)]
    assert np.mean([s.error for s in shares]) == pytest.approx(np.std([s.value for s in shares]), rel=0.15)


def test_a_comparison_names_every_benchmark_and_the_mean():
    models = [[scored([1, 1], "a"), scored([1, 0], "b"), scored([0, 0], "d", "domain")],
              [scored([0, 0], "a"), scored([1, 0], "b"), scored([1, 1], "d", "domain")],
              [scored([1, 0], "a"), scored([1, 1], "b"), scored([1, 0], "d", "domain")]]  # fmt: skip
    compared = scores.comparison(*models)
    assert set(compared["recovery"]) == {"a", "mean"}, "b was not lost"
    assert compared["recovery"]["a"][0] == 0.5 and compared["recovery"]["mean"][0] == 1.0
    assert compared["retention"]["d"][0] == compared["retention"]["mean"][0] == 0.5


# ------------------------------------------------------------------------------ which one is best


def standing(general_share, lost=0, gained=0):
    """Of a student with that share of 100 lost general questions back, and so many of 90 domain ones lost."""
    n = round(100 * general_share)
    general = [scored([1] * 100), scored([0] * 100), scored([1] * n + [0] * (100 - n))]
    before = scored([1] * 90 + [0] * 10, "d", "domain")
    after = scored([1] * (90 - lost) + [0] * lost + [1] * gained + [0] * (10 - gained), "d", "domain")
    return scores.standing(*([g, k] for g, k in zip(general, [before, before, after], strict=True)))


def test_recovery_decides_among_those_that_keep_the_domain():
    assert standing(0.5) == Standing(True, 0.5)
    assert standing(0.9, lost=3, gained=2) == Standing(True, 0.9), "one fewer, within one standard error"
    lost = standing(0.9, lost=30)
    assert not lost.keeps and lost.merit == pytest.approx(60 / 90)
    best_first = [standing(0.7), standing(0.5, gained=5), standing(0.9, lost=20), standing(1.0, lost=30)]
    assert sorted(best_first, reverse=True) == best_first


def test_with_one_axis_alone_that_axis_decides():
    general = [[scored(s)] for s in ([1, 1], [0, 0], [1, 0])]
    domain = [[scored(s, "d", "domain")] for s in ([0, 0], [1, 1], [1, 0])]
    assert scores.standing(*general) == Standing(True, 0.5)
    assert scores.standing(*domain).merit == 0.5
    assert scores.standing([], [], []) is None


@pytest.mark.parametrize(
    "merits, patience, ends",
    [([1, 2, 3], 1, False), ([1, 3, 2], 1, True), ([3, 3], 1, True), ([3, 1, 2], 2, True), ([3, 1, 4], 2, False),
     ([3, 1], 2, False), ([3, 2, 1], 0, False), ([3], 1, False)],
)  # fmt: skip
def test_patience(merits, patience, ends):
    assert scores.out_of_patience([Standing(True, m) for m in merits], patience) == ends


# --------------------------------------------------------------------------------------- tables


def text(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def models(*names):
    shares = itertools.cycle([(100, 100, 0), (20, 40, 100), (80, 70, 95)])
    return {
        name: [scored([1] * n + [0] * (100 - n), bench, axis)
               for n, (bench, axis) in zip(of, (("covered", "general"), ("uncovered", "general"), ("medqa", "domain")),
                                           strict=True)]
        for name, of in zip(names, shares, strict=False)
    }  # fmt: skip


def test_the_table_fits_eighty_columns():
    shown = text(scores.table(models("general", "specialised", "student")))
    lines = {line.split("  ")[0].strip(): line for line in shown.splitlines()}
    assert "75 ± 5 %" in lines["general: covered"] and "95 ± 2 %" in lines["domain: medqa"]
    assert all(part in lines["general: uncovered"] for part in ("100.0", "40.0", "70.0", "50 ± "))
    assert all(part in lines["general: mean"] for part in ("100.0", "30.0", "75.0"))
    assert "recovered" in shown and "…" not in shown


def test_one_model_alone_has_nothing_to_be_compared_with():
    shown = text(scores.table(models("mine")))
    assert "mine" in shown and "back" not in shown


def test_details_tell_what_an_accuracy_does_not():
    benchmark = Benchmark("ifeval", samples=2, temperature=0.7, top_p=0.9, max_response_tokens=384)
    grades = [[Grade(1.0, parts={"prompt_loose": (1, 1)}), Grade(0.0, False)]]
    row = scores.result(benchmark, grades, [10, 20], [True, False])
    shown = text(scores.details({"mine": [row], "student": [row]}), 120)
    for part in ("ifeval: 1 questions", "2 at T 0.7, top_p 0.9, at most 384 tokens", "15", "50", "prompt loose 100.0"):
        assert part in shown
    assert shown.count("prompt loose") == 2 and "recovered" in shown and "…" not in shown
