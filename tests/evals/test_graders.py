import pytest

from camopd_jax.evals.graders import choice, exact


@pytest.mark.parametrize(
    "answer, right",
    [
        ("Final answer: B", True),
        ("final answer: b.", True),
        ("**Final answer: (B)**", True),
        ("Final answer: A ... no. Final answer: B", True),
        ("Final answer: B ... no. Final answer: A", False),
        ("Final answer: Because of this", False),
        ("Final answer: B's", False),
    ],
)
def test_choice_takes_the_letter_after_the_last_marker(answer, right):
    assert choice(answer, "B").correct == right


def test_choice_tells_an_answer_without_the_form():
    assert not choice("B", "B").correct and not choice("B", "B").marked
    assert choice("Final answer: A", "B").marked


def test_exact_is_the_whole_answer():
    assert exact(" cba\n", "cba").correct
    assert not exact("cba.", "cba").correct
