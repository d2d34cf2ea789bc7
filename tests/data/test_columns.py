"""Rows of public datasets by their true column names, as a copy of the hub's gives them."""

import pytest

from camopd_jax.data.columns import normalise

MEDMCQA = {"id": "e9", "question": "Which one?", "opa": "Iron", "opb": "Zinc", "opc": "Lead", "opd": "Gold", "cop": 2,
           "choice_type": "single", "exp": "Because.", "subject_name": "Medicine", "topic_name": None}  # fmt: skip
MEDQA = {"question": "Which one?", "answer": "Zinc", "options": {"A": "Iron", "B": "Zinc", "C": "Lead", "D": "Gold"},
         "meta_info": "step1", "answer_idx": "B", "metamap_phrases": []}  # fmt: skip
ARC = {
    "id": "M_1",
    "question": "Which one?",
    "choices": {"text": ["Iron", "Zinc"], "label": ["1", "2"]},
    "answerKey": "2",
}
PUBMEDQA = {"pubid": 1, "question": "Does it?", "context": {"contexts": ["It may.", "Or not."], "labels": ["A", "B"]},
            "long_answer": "It does.", "final_decision": "no"}  # fmt: skip
MEDREASON = {"dataset_name": "medmcqa", "id_in_dataset": 1, "question": "Which one?", "answer": "Zinc.",
             "reasoning": "So.", "options": "Answer Choices:\nA. Iron\nB. Zinc\nC. Lead\nD. Gold"}  # fmt: skip
DISTILL = {"question": "Why?", "reasoning (reasoning_content)": "Hm.", "response (content)": "Therefore."}
M23K = {"answer_idx": 1, "source": "x", "metadata": "", "prompt": "Which one?\nA. Iron", "answer_letter": "A",
        "answer_string": "Iron", "reasoning": "So.", "distilled_answer_string": "A", "text": "tokens"}  # fmt: skip
GSM8K = {"question": "How many?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"}
MBPP = {"task_id": 11, "text": "Write f.", "code": "def f(): pass", "test_list": ["assert f() is None"],
        "test_setup_code": "", "challenge_test_list": []}  # fmt: skip
SANITIZED = {"source_file": "x", "task_id": 11, "prompt": "Write f.", "code": "", "test_imports": [],
             "test_list": ["assert f() is None"]}  # fmt: skip
IFEVAL = {"key": 1000, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ZEBRA = {"id": "z", "size": "2*2", "puzzle": "Two houses.", "created_at": "x",
         "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Arnold"]]}}  # fmt: skip
COSER = {"conversations": [{"from": "system", "value": "You are Ahab."}, {"from": "human", "value": "Where?"},
                           {"from": "gpt", "value": "There."}]}  # fmt: skip
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
def test_a_row_becomes_a_question_with_its_answer(row, content, answer):
    made = normalise(row)
    assert made["messages"] == [{"role": "user", "content": content}]
    assert made.get("answer") == answer
    assert row.keys() <= made.keys(), "whatever else a row holds is kept"


def test_a_puzzle_asks_for_its_grid_and_never_shows_it():
    made = normalise(ZEBRA)
    assert made["answer"] == {"House 1": {"Name": "Eric"}, "House 2": {"Name": "Arnold"}}
    asked = made["messages"][0]["content"]
    assert "Eric" not in asked and asked.count('"Name": "___"') == 2
    masked = ZEBRA | {"solution": {"header": ["House", "Name"], "rows": [["1", "___"], ["2", "___"]]}}
    assert "answer" not in normalise(masked)


def test_conversations_in_the_way_of_sharegpt():
    assert [m["role"] for m in normalise(COSER)["messages"]] == ["system", "user", "assistant"]
    odd = {"conversations": [{"from": "narrator", "value": "x"}]}
    assert normalise(odd) == odd


def test_rows_of_ours_are_left_alone():
    for row in (
        {"messages": [], "question": "q", "answer": "a"},
        {"question": "q", "answer": "no mark"},
        {"prompt": "p"},
    ):
        assert normalise(row) == row
