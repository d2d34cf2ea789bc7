"""Any change of a sound row gives a row that all behind the reader can use, or a UserError with file and line."""

import copy
import json

import hub_rows
import pytest

from camopd_jax.config.schema import Benchmark, Judge
from camopd_jax.data import sources
from camopd_jax.data.prompt_set import Excluded, select_prompts
from camopd_jax.data.questions import question_keys
from camopd_jax.data.recipes import RECIPES
from camopd_jax.errors import UserError
from camopd_jax.evals import questions, tasks
from camopd_jax.evals.graders import judge, mbpp
from camopd_jax.evals.task import Grade

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
OWN = {
    "MESSAGES": {"messages": [*MESSAGES, CALL], "tools": [{"type": "function"}], "answer": "A"},
    "PROMPT": {"prompt": "Why?", "response": "so", "answer": "7"},
    "IDS": {"prompt_ids": [1, 2], "response_ids": [3]},
    "CHAT_PROMPT": {"prompt": MESSAGES, "answer": "yes"},
    "CONVERSATIONS": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
    "WILDCHAT": {"conversation": [{"role": "user", "content": "Hi", "toxic": False}]},
    "LIST": {"question": "q", "options": ["a", "b"], "answer_idx": 1},
    "MMLU": {"question": "q", "choices": ["a", "b", "c"], "answer": 2, "subject": "x"},
    "QUESTION": {"question": "q", "answer": "in words"},
    "NEEDY": {"question": "q", "options": ["a"], "messages": MESSAGES},
}
SOUND = {name: row for name, row in vars(hub_rows).items() if name.isupper()} | OWN
VALUES = [None, 0, -1, 7, 2.5, float("nan"), True, "", " ", "x", "A", "1" * 5000, "half \ud83d", [], ["x"], [7], [None],
          ["x"] * 30, [["x"]], [{"role": "user"}], [{}], {}, {"x": None}, {"A": "a", "B": 1}]  # fmt: skip
DELETED = object()


def places(value, path=()):
    """The paths of all fields and elements of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(row, path, value):
    row = copy.deepcopy(row)
    at = row
    for key in path[:-1]:
        at = at[key]
    if value is DELETED:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return row


def changes(row):
    yield row
    for path in places(row):
        for value in (DELETED, *VALUES):
            yield changed(row, path, value)


def gradable(row, name):
    """The row as a benchmark's question, if it is one."""
    benchmark = Benchmark("b", name, source="unused.jsonl", answer="{answer}")
    task = tasks.find(benchmark, Judge("http://127.0.0.1", "m"))
    with sources.naming("x:1"):
        questions._check(row, benchmark, task)
    return task


@pytest.mark.parametrize("name", SOUND)
def test_a_changed_row_is_read_or_refused_by_name(name):
    read = refused = 0
    for raw in changes(SOUND[name]):
        try:
            row = sources.checked(raw, "x:1")
        except UserError as error:
            assert str(error).startswith("x:1: ") and "\n" not in str(error) and str(error).encode()
            refused += 1
            continue
        read += 1
        if "messages" in row:
            assert row["messages"]
            for message in row["messages"]:
                assert isinstance(message["role"], str) and isinstance(message["content"], str)
                assert None not in message.values()
        else:
            assert isinstance(row.get("prompt", row.get("prompt_ids")), str | list)
        assert row.get("answer", "") is not None
        json.dumps(row, ensure_ascii=False).encode()
        question_keys(row)
        questions.with_instruction(row, "Be brief.")
        for recipe in RECIPES.values():
            for part in recipe.parts:
                chosen = select_prompts(part, [(raw, "x:1")], Excluded(set()), 0)
                assert len(chosen.prompts) + sum(chosen.dropped.values()) == 1
    assert read and refused


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
@pytest.mark.filterwarnings("ignore:IFEval")
def test_every_question_that_is_read_can_be_graded(name, monkeypatch):
    monkeypatch.setattr(mbpp, "passes", lambda program: bool(program.encode()))
    monkeypatch.setattr(judge, "grade", lambda answer, row, **_: Grade(float(answer in judge._case(answer, row))))
    answer = {"likelihood": "-0.5"}.get(name, "```python\nx\n```\nFinal answer: A")
    graded = 0
    for raw in (raw for row in SOUND.values() for raw in changes(row)):
        try:
            row = sources.checked(raw, "x:1")
            task = gradable(row, name)
        except UserError:
            continue
        try:
            task.grade(answer, row)
        except UserError as error:
            assert name == "ifeval" and "no checker for" in str(error)
        graded += 1
    assert graded
