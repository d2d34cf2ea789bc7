"""The likelihood of given answers: the geometric mean of their tokens' probabilities, 1 / perplexity.

Nothing is sampled. It measures what a model knows although it is too weak to answer, or answers in another form, and
it changes long before the answers do.
"""

import math

from camopd_jax.evals.task import Grade, Row, Task


def grade(answer: str, row: Row) -> Grade:
    """exp of the mean log-probability of the given answer's tokens, in nats, which `answer` holds as text.

    >>> grade("-0.6931471805599453", {})
    Grade(value=0.5, marked=True, parts={})
    """
    return Grade(math.exp(float(answer)))


TASK = Task(grade, needs=("messages",), given=True)
