"""The answer is right if it is equal to the row's "answer", except for white space around it."""

from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer is equal to the row's "answer", else 0."""
    return Grade(float(answer.strip() == str(row["answer"]).strip()))


TASK = Task(grade)
