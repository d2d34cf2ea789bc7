"""What a benchmark is: what it adds to a question, and how it grades an answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Grade:
    """What one answer is worth."""

    score: float  # in [0, 1]
    marked: bool = True  # the answer has the form the benchmark asks for
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)  # further counts by name: (right, of)


@dataclass(frozen=True)
class Task:
    """A benchmark's rules. Rows are questions: "messages", and the fields that `needs` names."""

    grade: Callable[[str, Row], Grade]
    instruction: str = ""  # put behind the question: the form of the answer
    needs: tuple[str, ...] = ("answer",)
    dataset: str = ""  # where the benchmark itself lies, as a Stream's source
    split: str = "test"
    threads: int = 1  # answers graded at one time
    grader: str = ""  # who grades, where that costs: a grade that it gave is not asked for again
    given: bool = False  # the model is not asked for answers but for the likelihood of given ones
    check: Callable[[], None] = lambda: None  # raises a UserError where something that grading needs is not there
