"""The answer is right if it is equal to the row's "answer", except for white space around it."""

from camopd_jax.errors import UserError
from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer is equal to the row's "answer", else 0."""
    return Grade(float(answer.strip() == str(row["answer"]).strip()))


def _check_row(row: Row) -> None:
    if type(row["answer"]) not in (str, int, float):
        raise UserError(f'"answer" is {row["answer"]!r:.80}; it must be a text or a number, to which answers are equal')


TASK = Task(grade, check_row=_check_row)
