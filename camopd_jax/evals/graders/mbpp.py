"""MBPP: runs a Python function and its tests in a separate process; evals/sandbox.py describes the protections."""

import re

from camopd_jax.errors import UserError
from camopd_jax.evals import sandbox
from camopd_jax.evals.task import Grade, Row, Task

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def code(answer: str) -> str | None:
    """The closed Python blocks of an answer, joined; None if it has none."""
    blocks = _BLOCK.findall(answer)
    return "\n".join(blocks) if blocks else None


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer's code passes all tests of the row's "test_list", else 0."""
    program = code(answer)
    if program is None:
        return Grade(0.0, marked=False)
    tests = [*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]]
    return Grade(float(sandbox.passes("\n".join([program, *tests]))))


def check() -> None:
    """Raises UserError if no program can be run on this machine."""
    try:
        sandbox.best_way()
    except UserError as error:
        raise UserError(f"config.evaluation.benchmarks, task mbpp: {error}") from error


def _check_row(row: Row) -> None:
    for name in ("test_list", "test_imports"):
        lines = row.get(name, [])
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise UserError(f'"{name}" must be a list of lines of code, this is {lines!r:.80}')
    if not row["test_list"]:
        raise UserError('"test_list" is empty: every answer would pass')
    if not isinstance(row.get("test_setup_code", ""), str):
        raise UserError(f'"test_setup_code" must be text, this is {row["test_setup_code"]!r:.80}')


TASK = Task(
    grade,
    "Answer with one Python code block.",
    needs=("test_list",),
    check_row=_check_row,
    threads=4,
    check=check,
    notice=sandbox.protections,
    dataset="google-research-datasets/mbpp:full",
)
