"""The likelihood of given answers: the geometric mean of their tokens' probabilities, 1 / perplexity.

Nothing is sampled. It also measures models that are too weak to answer or answer in another form, and in training it
changes long before the sampled answers do.
"""

import math

from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    """exp of the mean log-probability of the given answer's tokens in nats; `answer` is this number as text.

    >>> grade("-0.6931471805599453", {})
    Grade(value=0.5, marked=True, parts={})
    """
    return Grade(math.exp(float(answer)))


TASK = Task(grade, needs=("messages",), grades_likelihood=True)
