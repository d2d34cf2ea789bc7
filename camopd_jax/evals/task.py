"""A benchmark's rules: what is added to its questions, and how an answer is graded."""

from collections.abc import Callable
from dataclasses import dataclass, field

from camopd_jax.data.columns import Row as Row


@dataclass(frozen=True)
class Grade:
    """The grade of one answer."""

    value: float  # in [0, 1]
    marked: bool = True  # whether the answer has the form that the benchmark asks for
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)  # further counts by name: (right, of)


def _no_check() -> None:
    pass


@dataclass(frozen=True)
class Task:
    """A benchmark's rules. Its rows are questions: a prompt, and the fields that `needs` names."""

    grade: Callable[[str, Row], Grade]  # of an answer's text to a row
    instruction: str = ""  # put behind each question: the form of the answer
    needs: tuple[str, ...] = ("answer",)  # fields of a row that `grade` reads
    dataset: str = ""  # the benchmark's own questions, as a Stream's source; "": it has none
    split: str = "test"  # of `dataset`
    threads: int = 1  # answers graded at one time
    grader: str = ""  # names who grades, where grading costs: a grade of the same grader is not computed again
    # Whether the model's likelihood of the row's given answer is graded, instead of an answer of its own. `grade` then
    # takes the mean log-probability of the given answer's tokens, in nats, as text
    given: bool = False
    check: Callable[[], None] = _no_check  # raises a UserError if a package or setting that grading needs is missing
    notice: Callable[[], str] = str  # a line to print at the start of an evaluation; "": none
