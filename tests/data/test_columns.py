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
from camopd_jax.errors import UserError

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


LETTERED = {"A": "a", "B": "b"}
TWELVE = {letter: str(i) for i, letter in enumerate("ABCDEFGHIJKL")}


@pytest.mark.parametrize(
    "row, answer, last_option",
    [
        ({"options": ["a", "b"], "answer_idx": 1}, "B", "B. b"),
        ({"options": LETTERED, "answer_idx": "a"}, "A", "B. b"),
        ({"options": LETTERED, "answer_idx": 0}, "A", "B. b"),
        ({"options": LETTERED, "answer_idx": "1"}, "B", "B. b"),
        ({"options": LETTERED | {"C": None}, "answer_idx": "B"}, "B", "B. b"),
        ({"options": LETTERED}, None, "B. b"),
        ({"options": LETTERED, "answer_idx": "", "answer": ""}, None, "B. b"),
        ({"options": LETTERED, "answer_idx": -1}, None, "B. b"),
        ({"options": LETTERED, "answer": "b"}, "B", "B. b"),
        ({"options": TWELVE, "answer_idx": "L"}, "L", "L. 11"),
        ({"options": TWELVE, "answer_idx": 11}, "L", "L. 11"),
        ({"choices": ["2", "1", "0"], "answer": 0}, "A", "C. 0"),
        ({"choices": ["2", "1", "0"], "answer": "0"}, "C", "C. 0"),
        ({"choices": {"label": ["1", "2"], "text": ["a", "b"]}, "answerKey": "2"}, "B", "B. b"),
        ({"choices": {"label": ["A", "B"], "text": ["a", "b"]}}, None, "B. b"),
        (dict(zip(("opa", "opb", "opc", "opd"), "3120", strict=True)) | {"cop": "2"}, "C", "D. 0"),
    ],
)
def test_options_and_their_answer_in_other_forms(row, answer, last_option):
    made = normalise({"question": "q"} | row)
    assert made["messages"][0]["content"].splitlines()[-1] == last_option and made.get("answer") == answer
    assert ("answer" in made) == (answer is not None)
    if answer:
        assert made["answer_text"] == made["options"][ord(answer) - ord("A")]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": 7, "options": LETTERED, "answer_idx": "A"}, '"question" must be text, this is 7'),
        ({"options": LETTERED, "answer_idx": "Z"}, "\"answer_idx\" is 'Z', which names none of the 2 options"),
        ({"options": LETTERED, "answer_idx": 2}, '"answer_idx" is 2, which names none of the 2 options'),
        ({"options": LETTERED, "answer_idx": True}, '"answer_idx" is True, which'),
        ({"options": "A. a B. b", "answer_idx": "A"}, "\"options\" must be a list of texts, this is 'A. a B. b'"),
        ({"options": {"A": 1}, "answer_idx": "A"}, '"options" must be a list of texts, this is [1]'),
        ({"options": [], "answer_idx": 0}, '"options" must give every option a label'),
        ({"options": ["x"] * 27, "answer_idx": 0}, "27 options; it may have up to 26"),
        ({"choices": {"label": ["A"], "text": ["a", "b"]}, "answerKey": "A"}, '"choices" must give every option'),
        ({"choices": {"text": ["a", "b"]}, "answerKey": "A"}, '"choices" must be a list of texts'),
        ({"context": {"labels": []}, "final_decision": "no"}, '"context" must be text or hold a list "contexts"'),
        ({"context": {"contexts": ["c"]}, "final_decision": "perhaps"}, "must be one of yes, no, maybe"),
    ],
)
def test_a_value_that_a_form_does_not_have_is_named(row, says):
    with pytest.raises(UserError) as error:
        normalise({"question": "q"} | row)
    assert says in str(error.value)


SAID = [{"role": "user", "content": "sort cab"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": SAID},
        {"conversations": SAID},
        {"conversations": [{"from": "human", "value": "sort cab"}]},
        {"conversation": SAID},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": w} for w in ("sort ", "cab")]}]},
    ],
)
def test_conversations_in_other_forms(row):
    assert normalise(row) == row | {"messages": SAID}


def test_conversations_in_the_way_of_sharegpt():
    assert [m["role"] for m in normalise(COSER)["messages"]] == ["system", "user", "assistant"]


def test_rows_in_our_format_are_not_changed():
    for row in (
        {"messages": SAID, "question": "q", "answer": "a"},
        {"prompt": "p"},
        {"prompt": "p", "question": "q", "options": ["a"], "answer": "a", "conversation": SAID},
    ):
        assert normalise(row) == row


def test_a_question_that_may_need_more_than_its_words_is_no_prompt():
    assert normalise({"question": "q", "answer": "in words"})["messages"] == [{"role": "user", "content": "q"}]
    for more in ({"passage": "p"}, {"context": "c"}, {"facts": ["f"]}, {"answer": True}):
        row = {"question": "q", "answer": "in words"} | more
        assert normalise(row) == row
    race = {"article": "t", "question": "q", "options": ["a", "b"], "answer": "B"}
    assert normalise(race) == race
