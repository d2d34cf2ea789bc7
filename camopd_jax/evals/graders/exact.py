"""The answer is right if it equals the row's, white space around it aside."""

from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer is the row's "answer", else 0."""
    return Grade(float(answer.strip() == str(row["answer"]).strip()))


TASK = Task(grade)
