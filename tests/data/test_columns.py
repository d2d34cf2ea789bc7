"""Conversion of rows of public datasets, with the column names on the hub."""

import pytest
from hub_rows import (
    ARC,
    COSER,
    DISTILL,
    GSM8K,
    IFEVAL,
    M23K,
    MBPP,
    MEDMCQA,
    MEDQA,
    MEDREASON,
    PUBMEDQA,
    SANITIZED,
    ZEBRA,
)

from camopd_jax.data.columns import normalise

OPTIONS = "\n\nA. Iron\nB. Zinc\nC. Lead\nD. Gold"


@pytest.mark.parametrize(
    "row, content, answer",
    [
        (MEDMCQA, "Which one?" + OPTIONS, "C"),
        (MEDMCQA | {"cop": -1}, "Which one?" + OPTIONS, None),
        (MEDQA, "Which one?" + OPTIONS, "B"),
        (ARC, "Which one?\n\nA. Iron\nB. Zinc", "B"),
        (PUBMEDQA, "It may.\nOr not.\nDoes it?\n\nA. yes\nB. no\nC. maybe", "no"),
        (MEDREASON, "Which one?" + OPTIONS, "Zinc."),
        (DISTILL, "Why?", None),
        (M23K, "Which one?\nA. Iron", None),
        (GSM8K, "How many?", "6"),
        (MBPP, "Write f.\nYour code should pass these tests:\nassert f() is None", None),
        (SANITIZED, "Write f.\nYour code should pass these tests:\nassert f() is None", None),
        (IFEVAL, "Write.", None),
    ],
)
def test_a_row_is_converted_to_a_question_and_answer(row, content, answer):
    made = normalise(row)
    assert made["messages"] == [{"role": "user", "content": content}]
    assert made.get("answer") == answer
    assert row.keys() <= made.keys(), "whatever else a row holds is kept"


def test_a_puzzle_prompt_has_an_empty_grid():
    made = normalise(ZEBRA)
    assert made["answer"] == {"House 1": {"Name": "Eric"}, "House 2": {"Name": "Arnold"}}
    prompt = made["messages"][0]["content"]
    assert "Eric" not in prompt and prompt.count('"Name": "___"') == 2
    masked = ZEBRA | {"solution": {"header": ["House", "Name"], "rows": [["1", "___"], ["2", "___"]]}}
    assert "answer" not in normalise(masked)


def test_sharegpt_conversations():
    assert [m["role"] for m in normalise(COSER)["messages"]] == ["system", "user", "assistant"]
    odd = {"conversations": [{"from": "narrator", "value": "x"}]}
    assert normalise(odd) == odd


def test_rows_in_our_format_are_not_changed():
    for row in (
        {"messages": [], "question": "q", "answer": "a"},
        {"question": "q", "answer": "no mark"},
        {"prompt": "p"},
    ):
        assert normalise(row) == row
