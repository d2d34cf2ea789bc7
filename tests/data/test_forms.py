"""Rows in the forms of other trainers (TRL, verl, LLaMA-Factory, ms-swift): what is read, and what is refused."""

import json

import pytest

from camopd_jax.data.questions import question_keys
from camopd_jax.data.sources import checked
from camopd_jax.errors import UserError

U, A = {"role": "user", "content": "sort cab"}, {"role": "assistant", "content": "abc"}
S = {"role": "system", "content": "Be kind."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "row, messages",
    [
        # A system prompt in a column of its own
        ({"system": "Be kind.", "messages": [U, A]}, [S, U, A]),
        ({"system_prompt": "Be kind.", "conversations": [{"from": "human", "value": "sort cab"}]}, [S, U]),
        ({"system": "Be brief.", "messages": [S, U]}, [S, U]),
        ({"system": " ", "messages": [U]}, [U]),
        ({"system_prompt": "Be kind.", "question": "sort cab", "response": "abc"}, [S, U, A]),  # OpenOrca
        # Roles in other words. An answer at the end would otherwise be a part of the prompt
        ({"messages": [U | {"role": "User"}, A | {"role": "Assistant"}]}, [U, A]),
        ({"messages": [U | {"role": "human"}, A | {"role": "gpt"}]}, [U, A]),
        ({"messages": [U, A | {"role": "model"}]}, [U, A]),
        ({"messages": [U | {"role": "developer"}, U]}, [U | {"role": "developer"}, U]),
        ({"conversations": [{"from": "Human", "value": "sort cab"}, {"from": "chatgpt", "value": "abc"}]}, [U, A]),
        # Tools
        (
            {
                "conversations": [
                    {"from": "human", "value": "sort cab"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "abc"},
                ]
            },
            [U, CALLED, RESULT, A],
        ),
        (
            {
                "messages": [
                    U,
                    {"role": "tool_call", "content": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]'},
                    {"role": "tool_response", "content": "2"},
                ]
            },
            [U, CALLED, RESULT],
        ),
        (
            {
                "messages": [
                    U,
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
                    {"role": "function", "name": "f", "content": "2"},
                ]
            },
            [U, CALLED, RESULT | {"name": "f"}],
        ),
        # JSON text, as cells of a table have it
        ({"messages": json.dumps([U, A])}, [U, A]),
        ({"prompt": json.dumps([U])}, [U]),
        ({"conversations": json.dumps([{"from": "human", "value": "sort cab"}])}, [U]),
        # TRL
        ({"prompt": [U], "completion": [A]}, [U, A]),
        ({"prompt": [U], "completion": "abc"}, [U]),
        ({"prompt": [U], "chosen": [A], "rejected": [A]}, [U]),
        ({"chosen": [U, A], "rejected": [U, U]}, [U, A]),
        # Alpaca, ms-swift, and questions
        ({"instruction": "Sort.", "input": "cab", "output": "abc"}, turns("Sort.\ncab", "abc")),
        ({"instruction": "sort cab", "input": "", "output": ""}, [U]),
        (
            {"system": "Be kind.", "instruction": "c", "output": "d", "history": [["a", "b"]]},
            [S, *turns("a", "b", "c", "d")],
        ),
        ({"instruction": "sort cab", "context": "", "response": "abc", "category": "x"}, [U, A]),
        ({"query": "c", "response": "d", "history": '[["a", "b"]]'}, turns("a", "b", "c", "d")),
        ({"question": "sort cab", "id": "x", "level": 3}, [U]),
        ({"question": "sort cab", "answer": 4}, [U]),
        ({"problem": "sort cab", "solution": "abc"}, [U]),
    ],
)
def test_the_conversation_of_a_row(row, messages):
    made = checked(row, "row 0")
    assert made["messages"] == messages
    assert checked(made, "row 0")["messages"] == messages, "as a row that was written is read again"


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"prompt": [U], "ground_truth": "abc"}, "abc"),
        ({"prompt": [U], "reward_model": {"style": "rule", "ground_truth": "72"}}, "72"),  # verl
        ({"problem": "1 + 1?", "expected_answer": 2}, 2),
        ({"messages": [U], "answer": "x", "ground_truth": "y"}, "x"),
        ({"question": "Which?", "A": "x", "B": "y", "C": "", "answer": "b"}, "B"),  # C-Eval
        ({"question": "Which?", "options": "['x', 'y']", "answer": "y"}, "B"),  # a table that pandas wrote
        ({"question": "Which?", "options": '{"A": "x", "B": "y"}', "answer_idx": "B"}, "B"),
    ],
)
def test_the_answer_of_a_row(row, answer):
    made = checked(row, "row 0")
    assert made["answer"] == answer
    if "question" in row:
        assert made["messages"] == [{"role": "user", "content": "Which?\n\nA. x\nB. y"}]


def test_functions_are_tools():
    assert checked({"messages": [U], "functions": [{"name": "f"}]}, "")["tools"] == [
        {"type": "function", "function": {"name": "f"}}
    ]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"messages": [U], "images": ["a.png"]}, '"images" is not text'),
        ({"question": "Which?", "answer": "A", "image": {"bytes": "0"}}, '"image" is not text'),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "a list in Python's notation; write it as JSON"),
        ({"prompt": "[{'content': 'a', 'role': 'user'}]"}, "a list in Python's notation; write it as JSON"),
        ({"messages": '{"role": "user"}'}, '"messages" must be a list of at least one message'),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "a function call must be JSON with"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, '"history" must be a list of pairs'),
        ({"question": "Which?", "choices": "['x' 'y']", "answer": "0"}, '"choices" must be a list of options'),
        ({"question": "Which?", "option_a": "x", "option_b": "y", "answer": "A"}, "no prompt"),
        ({"question": "Which?", "sol1": "x", "sol2": "y", "answer": 0}, "no prompt"),
        ({"question": "Does he?", "sentence": "He does."}, "no prompt"),
        ({"question": "Does he?", "passage": "He does.", "answer": True}, "no prompt"),
        ({"instruction": "Sum up.", "context": "It was.", "response": "b"}, "no prompt"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "no prompt"),
    ],
)
def test_rows_that_are_refused(row, says):
    with pytest.raises(UserError, match="^row 0: ") as error:
        checked(row, "row 0")
    assert says in str(error.value)


def test_text_that_begins_like_a_list_is_a_prompt():
    for text in ("[1, 2, 3]", '[{"a": 1}]', "[{'a': 1}] is printed by", "{'role': 1}"):
        assert checked({"prompt": text}, "") == {"prompt": text}


def test_an_answer_does_not_hide_the_question_before_it():
    """Otherwise a benchmark's question with an answer behind it would pass as no evaluation question."""
    question = {"role": "user", "content": "Which of these seven metals melts at the lowest temperature of all?"}
    assert question_keys({"messages": [S, question, A]}) == question_keys({"messages": [question]})
    assert question_keys({"messages": [A]}) == {"abc"}
