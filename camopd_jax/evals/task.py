"""The type of a benchmark: the instruction added to its questions, and how answers are graded."""

from collections.abc import Callable
from dataclasses import dataclass, field

from camopd_jax.data.columns import Row as Row


@dataclass(frozen=True)
class Grade:
    """The grade of one answer."""

    value: float  # in [0, 1]
    marked: bool = True  # whether the answer has the required form
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)  # additional counts by name: (right, total)


def _no_check(*_: Row) -> None:
    pass


@dataclass(frozen=True)
class Task:
    """A benchmark. Its rows are questions: a prompt, and the fields in `needs`."""

    grade: Callable[[str, Row], Grade]  # grades an answer's text for a row
    instruction: str = ""  # text added after each question: the required form of the answer
    needs: tuple[str, ...] = ("answer",)  # fields of a row that `grade` reads
    check_row: Callable[[Row], None] = _no_check  # raises a UserError for fields that `grade` could not read
    dataset: str = ""  # the benchmark's own questions, as a Stream's source; "": it has none
    split: str = "test"  # of `dataset`
    threads: int = 1  # answers graded at a time
    grader: str = ""  # the name of the grader, if grading costs money: a grade of the same grader is reused
    # Whether the likelihood of a given answer is graded, instead of a sampled answer. `grade` then gets the mean
    # log-probability of the tokens of that answer, in nats, as text
    grades_likelihood: bool = False
    check: Callable[[], None] = _no_check  # raises a UserError if a package or setting for grading is missing
    notice: Callable[[], str] = str  # a line to print at the start of an evaluation; "": none
