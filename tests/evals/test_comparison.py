"""Recovery and retention by hand, and the best checkpoint."""

import json
import math

import numpy as np
import pytest
from results import scored

from camopd_jax.evals.comparison import (
    Rank,
    Ratio,
    comparison,
    kept_share,
    out_of_patience,
    rank_row,
    rank_student,
    ranks,
    recovered_share,
)


def test_recovery_and_retention_by_hand():
    general, specialised, student = scored([1, 1, 1, 1, 0]), scored([0, 0, 0, 1, 0]), scored([1, 1, 0, 1, 0])
    share = recovered_share([general], [specialised], [student])
    assert share.value == pytest.approx((0.6 - 0.2) / (0.8 - 0.2))
    residuals = [1 - 2 / 3, 1 - 2 / 3, -2 / 3, 0, 0]
    assert share.error == pytest.approx(np.std(residuals, ddof=1) / math.sqrt(5) / 0.6)
    share = kept_share([specialised], [student])
    assert share.value == pytest.approx(3.0)
    assert share.error == pytest.approx(np.std([1, 1, 0, -2, 0], ddof=1) / math.sqrt(5) / 0.2)


def test_no_recovery_if_nothing_was_lost():
    same = scored([1, 0])
    assert recovered_share([same], [same], [scored([1, 1])]) is None
    assert kept_share([scored([0, 0])], [same]) is None
    assert recovered_share([], [], []) is None


def test_a_student_that_equals_a_teacher_has_no_error():
    """The error is paired by question, so the variance between questions cancels."""
    general, specialised = scored([1, 1, 1, 0]), scored([1, 0, 0, 0])
    assert recovered_share([general], [specialised], [general]) == Ratio(1.0, 0.0)
    assert recovered_share([general], [specialised], [specialised]) == Ratio(0.0, 0.0)
    assert kept_share([specialised], [specialised]) == Ratio(1.0, 0.0)


def test_the_error_of_recovery_is_its_spread_over_samples_of_questions():
    rng = np.random.default_rng(0)

    def draw():
        u = rng.random(400)
        answers = [scored((u + 0.3 * rng.random(400) < p).astype(float)) for p in (0.9, 0.4, 0.7)]
        return recovered_share(*([a] for a in answers))

    shares = [draw() for _ in range(300)]
    assert np.mean([s.error for s in shares]) == pytest.approx(np.std([s.value for s in shares]), rel=0.15)


def test_a_comparison_names_every_benchmark_and_the_mean():
    models = [
        [scored([1, 1], "a"), scored([1, 0], "b"), scored([0, 0], "d", "domain")],
        [scored([0, 0], "a"), scored([1, 0], "b"), scored([1, 1], "d", "domain")],
        [scored([1, 0], "a"), scored([1, 1], "b"), scored([1, 0], "d", "domain")],
    ]
    compared = comparison(*models)
    assert set(compared["recovery"]) == {"a", "mean"}, "b was not lost"
    assert compared["recovery"]["a"][0] == 0.5 and compared["recovery"]["mean"][0] == 1.0
    assert compared["retention"]["d"][0] == compared["retention"]["mean"][0] == 0.5


# ------------------------------------------------------------------------------ which one is best


def rank(general_share, lost=0, gained=0):
    """The rank of a student that recovered this share of 100 lost general questions.

    Args:
      lost, gained: of 90 domain questions that the specialised model answered right, and of the others.
    """
    n = round(100 * general_share)
    general = [scored([1] * 100), scored([0] * 100), scored([1] * n + [0] * (100 - n))]
    before = scored([1] * 90 + [0] * 10, "d", "domain")
    after = scored([1] * (90 - lost) + [0] * lost + [1] * gained + [0] * (10 - gained), "d", "domain")
    return rank_student(*([g, k] for g, k in zip(general, [before, before, after], strict=True)))


def test_recovery_decides_among_those_that_keep_the_domain():
    assert rank(0.5) == Rank(True, 0.5)
    assert rank(0.9, lost=3, gained=2) == Rank(True, 0.9), "one fewer, within one standard error"
    lost = rank(0.9, lost=30)
    assert not lost.keeps_domain and lost.value == pytest.approx(60 / 90)
    best_first = [rank(0.7), rank(0.5, gained=5), rank(0.9, lost=20), rank(1.0, lost=30)]
    assert sorted(best_first, reverse=True) == best_first


def test_a_rank_is_read_from_its_row():
    lost, kept = rank(0.9, lost=30), rank(0.5)
    rows = [rank_row(4, lost, {"recovery": {}}), {"benchmark": "sums", "step": 4}, rank_row(8, kept, {})]
    assert ranks(json.loads(json.dumps(rows))) == {4: lost, 8: kept} and rows[0]["recovery"] == {}
    assert rows[2] == {"step": 8, "model": "student", "benchmark": "standing", "keeps": True, "merit": 0.5}


def test_with_one_axis_it_decides():
    general = [[scored(s)] for s in ([1, 1], [0, 0], [1, 0])]
    domain = [[scored(s, "d", "domain")] for s in ([0, 0], [1, 1], [1, 0])]
    assert rank_student(*general) == Rank(True, 0.5)
    assert rank_student(*domain).value == 0.5
    assert rank_student([], [], []) is None


@pytest.mark.parametrize(
    "merits, patience, ends",
    [
        ([1, 2, 3], 1, False),
        ([1, 3, 2], 1, True),
        ([3, 3], 1, True),
        ([3, 1, 2], 2, True),
        ([3, 1, 4], 2, False),
        ([3, 1], 2, False),
        ([3, 2, 1], 0, False),
        ([3], 1, False),
    ],
)
def test_patience(merits, patience, ends):
    assert out_of_patience([Rank(True, m) for m in merits], patience) == ends
