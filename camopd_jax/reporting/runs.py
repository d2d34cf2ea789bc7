"""What a report is made of: runs, those that are one line of its figures, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from camopd_jax.analysis import study
from camopd_jax.evals.comparison import rank_of
from camopd_jax.evals.results import Result, on_questions

Row = dict[str, Any]
TEACHERS = ("general", "specialised")


@dataclass(frozen=True)
class Run:
    """A run's work directory. Lists are empty where it has no such file."""

    folder: epath.Path
    config: dict[str, Any]
    metrics: list[Row]
    samples: list[Row]
    selection: list[Row]
    evaluations: list[Row]
    diagnostics: list[Row]
    exported: bool

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def ended(self) -> bool:
        last = final(self)
        return self.exported or (last is not None and last.step == self.steps == self.config["steps"])

    @property
    def tokens(self) -> int:
        """Answer tokens sampled so far."""
        return sum(row.get("response_tokens") or 0 for row in self.metrics)


@dataclass(frozen=True)
class Final:
    """A student's last scores beside its two teachers', on the same questions, benchmark by benchmark."""

    step: int
    general: list[Result]
    specialised: list[Result]
    student: list[Result]

    @property
    def models(self) -> tuple[list[Result], list[Result], list[Result]]:
        return self.general, self.specialised, self.student

    @property
    def questions(self) -> int:
        return sum(row["n"] for row in self.student)

    def without_tuning(self) -> "Final":
        """On the questions that did not choose a setting."""
        kept = [[on_questions(row, [i for i in range(row["n"]) if not study.tuning(i)]) for row in rows]
                for rows in self.models]  # fmt: skip
        return Final(self.step, *kept)


@dataclass(frozen=True)
class Group:
    """What is one line of a figure: a run alone, or a grid's runs of one method at one setting, by seed."""

    name: str
    method: str | None  # of controls.py
    origin: str  # the grid's folder; "" of a run alone
    runs: dict[int, Run]
    setting: float | None = None  # a learning rate; of the interpolation, the original model's weight
    tuning: bool = False  # a run that chooses a learning rate, shown while there are no others

    @property
    def run(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def distinct(self) -> list[Run]:
        """Its runs, each once: the interpolation is the same model whatever the seed."""
        return list({id(run): run for run in self.runs.values()}.values())


@dataclass(frozen=True)
class Source:
    """What one of the given directories holds."""

    folder: epath.Path
    groups: list[Group]
    found: int  # runs, tuning runs among them
    ended: int
    study: dict[str, Any] | None = None  # of a finished grid
    merits: dict[str, dict[str, float]] = field(default_factory=dict)  # by method and learning rate
    between: dict[float, Run] = field(default_factory=dict)  # the interpolation, by the original model's weight

    @property
    def is_grid(self) -> bool:
        return bool(self.groups and self.groups[0].origin)


# ---------------------------------------------------------------------------------- their scores


def final(run: Run) -> Final | None:
    """The scores of the model that a run ended with, or of its last evaluation; None without, or without teachers'."""
    names = [benchmark["name"] for benchmark in run.config["evaluation"]["benchmarks"]]
    rows = [row for row in run.evaluations if row["benchmark"] in names]
    teachers = [{row["benchmark"]: row for row in rows if row["model"] == teacher} for teacher in TEACHERS]
    asked = _whole_evaluations([row for row in rows if row["model"] not in TEACHERS], names)
    if not asked or any(len(of_teacher) < len(names) for of_teacher in teachers):
        return None
    step, of_student = next(((step, found) for step, found in reversed(asked) if step == _best(run)), asked[-1])
    student = [of_student[name] for name in names]
    before = [[on_questions(of[row["benchmark"]], range(row["n"])) for row in student] for of in teachers]
    return Final(step, *before, student)


def _whole_evaluations(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[int, dict[str, Row]]]:
    """Evaluations of a student that have every benchmark, in the order in which they ended."""
    whole, current, step = [], {}, None
    for row in rows:
        if row["step"] != step or row["benchmark"] in current:
            current, step = {}, row["step"]
        current[row["benchmark"]] = row
        if len(current) == len(names):
            whole.append((step, current))
    return whole


def _best(run: Run) -> int | None:
    """The step whose model was exported, where that is not the last."""
    rows = standings(run)
    if not run.exported or not rows or run.config["checkpoints"]["export"] != "best":
        return None
    return max(rows, key=lambda row: (rank_of(row), row["step"]))["step"]


def standings(run: Run) -> list[Row]:
    """The rows of eval.jsonl that tell how the student stood between the steps."""
    return [row for row in run.evaluations if row["benchmark"] == "standing"]
