"""The code of an answer and its tests run together, and pass or fail."""

import pytest

from camopd_jax.errors import UserError
from camopd_jax.evals import sandbox
from camopd_jax.evals.graders import mbpp

ROW = {"test_list": ["assert double(2) == 4", "assert double(-1) == -2"]}


@pytest.mark.parametrize(
    "answer, score, marked",
    [
        ("Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", 1, True),
        ("```py\ndef one(): return 1\n```\nand\n```\ndef double(x): return x + x * one()\n```", 1, True),
        ("```python\ndef double(x):\n    return x * x\n```", 0, True),
        ("```python\ndef double(x:\n```", 0, True),
        ("```python\nimport sys\nsys.exit(0)\n```", 0, True),
        ("```python\nimport os\nos._exit(0)\n```", 0, True),
        ("```python\nimport os\nos._exit(77)\n```", 0, True),
        ("def double(x): return 2 * x", 0, False),
        ("```python\ndef double(x): return 2", 0, False),
        ("", 0, False),
    ],
)
def test_an_answer_is_right_if_its_code_passes_every_test(answer, score, marked):
    grade = mbpp.grade(answer, ROW)
    assert (grade.value, grade.marked) == (score, marked)


def test_setup_code_runs_first():
    row = {
        "test_setup_code": "BASE = 3",
        "test_imports": ["import math"],
        "test_list": ["assert f() == math.pi + BASE"],
    }
    assert mbpp.grade("```python\ndef f():\n    return math.pi + BASE\n```", row).value == 1


def test_a_machine_that_runs_no_program_is_told_before_an_evaluation(monkeypatch):
    mbpp.check()
    sandbox.best_way.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.sys, "executable", "/bin/false")
        with pytest.raises(UserError, match="task mbpp: /bin/false: cannot run a program in a process of its own"):
            mbpp.check()
