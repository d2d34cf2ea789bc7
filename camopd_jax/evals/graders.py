"""Is an answer right? A grader takes the answer's text and the reference."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_MARKER = re.compile(r"final answer:\s*[*(\[]*\s*([a-z])\b(?!')", re.IGNORECASE)


@dataclass(frozen=True)
class Grade:
    correct: bool
    marked: bool = True  # the answer has the form the benchmark asks for


def exact(answer: str, reference: str) -> Grade:
    """The whole answer, save white space around it."""
    return Grade(answer.strip() == reference.strip())


def choice(answer: str, reference: str) -> Grade:
    """The letter after the last `Final answer:`; an answer without one is wrong, and counted as unmarked.

    >>> choice("A looks right at first. **Final answer: (B)**", "B")
    Grade(correct=True, marked=True)
    """
    letters = _MARKER.findall(answer)
    if not letters:
        return Grade(False, marked=False)
    return Grade(letters[-1].upper() == reference.strip().upper())


GRADERS: dict[str, Callable[[str, str], Grade]] = {"exact": exact, "choice": choice}
