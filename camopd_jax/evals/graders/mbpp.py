"""MBPP: a Python function, run against its tests in a process of its own; evals/sandbox.py says how far apart."""

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


TASK = Task(
    grade,
    "Answer with one Python code block.",
    needs=("test_list",),
    threads=4,
    check=check,
    notice=sandbox.protections,
    dataset="google-research-datasets/mbpp:full",
)
