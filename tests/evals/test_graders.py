"""Grades of typical answers: several letters, prose, boxes, units, commas, cut, empty."""

import json

import pytest

from camopd_jax.config.schema import Benchmark, Judge
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.evals.graders import choice, exact, gsm8k, zebra
from camopd_jax.evals.questions import read_questions


def test_every_task_is_found_and_an_unknown_one_is_an_error():
    for name in tasks.TASKS:
        assert callable(tasks.find(Benchmark("b", name), Judge()).grade)
    message = r"config\.evaluation\.benchmarks 'b': task is 'medq'; it must be one of 'exact', .*'medqa', .*'writing'"
    with pytest.raises(UserError, match=message):
        tasks.find(Benchmark("b", "medq"), Judge())


def test_exact_compares_the_full_answer():
    assert exact.grade(" olleh\n", {"answer": "olleh"}).value == 1
    assert exact.grade("olleh.", {"answer": "olleh"}).value == 0
    assert exact.grade("", {"answer": 3}).value == 0 and exact.grade("3", {"answer": 3}).value == 1


@pytest.mark.parametrize("answer", [["olleh"], {"a": 1}, True, "", " "])
def test_answers_that_nothing_can_be_equal_to(tmp_path, answer):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "reverse hello", "answer": answer}))
    with pytest.raises(
        UserError, match=r'x\.jsonl:1: ("answer" is .* it must be a text or a number|no "answer" to grade)'
    ):
        read_questions(Benchmark("b", source=str(tmp_path / "x.jsonl")), exact.TASK)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("Thinking... so it is C.\nFinal answer: C", "C"),
        ("Final answer: c", "C"),
        ("**Final Answer:** (B).", "B"),
        ("Final answer:\n\nD", "D"),
        (r"Final answer: $\boxed{\text{A}}$", "A"),
        ("Final answer: B. Ceftriaxone", "B"),
        ("Final answer: option D", "D"),
        ("Final answer: A\nI was wrong.\nFinal answer: B", "B"),
        ("```\nFinal answer: A\n```", "A"),
        ("Final answer: <B>", "B"),
        ('Final answer: "B"', "B"),
        ("Final answer: 'B'.", "B"),
        ("Final answer: \u201cB\u201d", "B"),
        ("Final answer: B) Ceftriaxone", "B"),
        (r"Final answer: $\boxed{\textbf{B}}$", "B"),
        ("Final answer\uff1a\uff22", "B"),  # a full-width colon and letter
        ("Final answer\uff1a\uff08\uff22\uff09\u3000Ceftriaxone", "B"),
        ("Final answer: <b>C</b>", "C"),
        ("Final answer: <strong>B</strong>. Hepatitis B and C", "B"),
        ("Final answer: <b>C", None),
        ("Final answer: <letter>", None),
        ("Final answer: <A/B/C/D>", None),
        ("Final answer: <B> or <C>", None),
        ('Final answer: "B" or "C"', None),
        ("Final answer: \uff22\uff0c\uff23", None),
        ("Final answer: B (or C)", None),
        ("Final answer: B, or C", None),
        ("Final answer: B and/or C", None),
        ("Final answer: B or possibly C", None),
        ("Final answer: B; C", None),
        ("Final answer: I'm not sure", None),
        ("Final answer: 'I' or 'B'", None),
        ("Final answer: A or B", None),
        ("Final answer: A, B", None),
        ("Final answer: A and C are both right", None),
        ("Final answer: A\n\nBut it could also be B.", None),
        ("Final answer: Because of its half-life", None),
        ("Final answer: B12", None),
        ("Final answer: none", None),
        ("Final answer:", None),
        ("Final ans", None),
        ("The answer is B.", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(answer, letter):
    assert choice.letter(answer) == letter
    grade = choice.grade(answer, {"answer": "B"})
    assert (grade.value, grade.marked) == (float(letter == "B"), letter is not None)


@pytest.mark.parametrize(
    "answer, score, marked",
    [
        ("Final answer: yes", 1, True),
        ("Final answer: A. Yes", 1, True),
        ("Final answer: (A)", 1, True),
        ("Final answer: maybe", 0, True),
        ("Final answer: yes or no", 0, False),
        ("Yes.", 0, False),
    ],
)
def test_pubmedqa_accepts_the_word_or_its_letter(answer, score, marked):
    for right in ("yes", "A"):
        grade = choice.grade_pubmedqa(answer, {"answer": right})
        assert (grade.value, grade.marked) == (score, marked)


@pytest.mark.parametrize(
    "answer, right",
    [
        ("6 * 7 = 42.\n#### 42", True),
        ("Final answer: 42", True),
        ("Final answer:\n42", True),
        ("**Final answer:** $42.00 dollars", True),
        (r"So the total is \boxed{42}.", True),
        (r"Final answer: $\boxed{\frac{84}{2}}$ apples", True),
        ("Final answer: 42 = 42", True),
        ("Final answer: 41\nWait. Final answer: 42", True),
        ("Final answer: 1,042", False),
        ("Final answer: -42", False),
        ("Final answer: 42 %, that is 0.42", None),
        ("Final answer: 42 or 43", None),
        ("Final answer: 42\u201343", None),
        ("Final answer: -\u20ac42", False),
        ("Final answer: 4 2", None),
        ("Final answer: forty-two", None),
        ("The result is 42", None),
        ("Final answer:", None),
        (r"\boxed{4", None),
        ("", None),
    ],
)
def test_the_number_of_gsm8k(answer, right):
    grade = gsm8k.grade(answer, {"answer": "42"})
    assert (grade.value, grade.marked) == (float(right is True), right is not None)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("Final answer: 1,234,567", "1234567"),
        (r"#### 1{,}200", "1,200"),
        ("#### \u22123", "-3"),
        ("Final answer: 3/4", "0.75"),
        ("Final answer: 2.50 euros", "2.5"),
        ("Final answer: 18.", "18"),
        ("Final answer: $1,234.50.", "1234.5"),
        ("Final answer\uff1a\uff14\uff0c\uff12\uff10\uff10\uff0e\uff15", "4200.5"),  # full-width throughout
        ("Final answer: \uff0d\uff15", "-5"),
        ("Final answer: 1\u202f234\u00a0567", "1234567"),
        ("Final answer: 1'234 CHF", "1234"),
        ("Final answer: 1_234", "1234"),
        ("Final answer: 1,00,000", "100000"),
        ("Final answer: 42\u20ac.", "42"),
        ("Final answer: -\u20ac42", "-42"),
        ("Final answer: -$42", "-42"),
        ("Final answer: Rs.42", "42"),
        ("Final answer: $.50", "0.5"),
        ("Final answer: 42 m\u00b2", "42"),
    ],
)
def test_numbers_are_compared_as_values(answer, gold):
    assert gsm8k.grade(answer, {"answer": gold}).value == 1


GRID = {"House 1": {"Name": "Arnold", "Music": "pop"}, "House 2": {"Name": "Eric", "Music": "rock"}}


@pytest.mark.parametrize(
    "answer, score, cells",
    [
        (
            'So {"solution": {"House 1": {"Name": "Arnold", "Music": "pop"}, '
            '"House 2": {"Name": "eric ", "Music": "rock"}}} is it.',
            1,
            4,
        ),
        (
            '```json\n{"solution": {"House 1": {"Name": "Arnold", "Music": "rock"}, '
            '"House 2": {"Name": "Eric", "Music": "pop"}}}\n```',
            0,
            2,
        ),
        ('{"solution": {"House 1": {"Name": "x"}}} no: {"solution": {"House 1": {"Name": "Arnold"}}}', 0, 1),
        ('{"solution": {"House 1": "Arnold", "House 2": null}}', 0, 0),
    ],
)
def test_zebra_grades_puzzle_and_cells(answer, score, cells):
    grade = zebra.grade(answer, {"answer": GRID})
    assert (grade.value, grade.marked, grade.parts["cells"]) == (score, True, (cells, 4))


@pytest.mark.parametrize(
    "answer", ["", "Arnold lives in house 1", '{"solution": {"House 1": {"Name": "Arn', "{}", "[{"]
)
def test_a_zebra_answer_without_a_grid(answer):
    grade = zebra.grade(answer, {"answer": GRID})
    assert (grade.value, grade.marked, grade.parts["cells"]) == (0, False, (0, 4))


def test_a_judge_must_be_configured():
    with pytest.raises(UserError, match=r"config\.evaluation\.judge: tasks roleplay and writing need its endpoint"):
        tasks.find(Benchmark("b", "roleplay"), Judge()).check()
