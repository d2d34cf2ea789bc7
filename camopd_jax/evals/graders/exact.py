"""The whole answer, save white space around it."""

from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    return Grade(float(answer.strip() == str(row["answer"]).strip()))


TASK = Task(grade)
