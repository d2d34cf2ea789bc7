"""How likely a model holds given answers: the geometric mean of their tokens' probabilities, 1 / perplexity.

Nothing is sampled. It tells what a model still knows where it is too weak, or too changed in form, to say it, and moves
long before its answers do.
"""

import math

from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    """`answer` is a number here: the mean log-probability of the given answer's tokens, in nats.

    >>> grade("-0.6931471805599453", {})
    Grade(score=0.5, marked=True, parts={})
    """
    return Grade(math.exp(float(answer)))


TASK = Task(grade, needs=(), given=True)
