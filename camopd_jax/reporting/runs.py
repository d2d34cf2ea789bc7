"""The data of a report: runs, and groups of runs that are one line in its figures."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from camopd_jax.analysis import study
from camopd_jax.analysis.study import Mean
from camopd_jax.config.methods import METHODS
from camopd_jax.evals.comparison import comparison, rank_of
from camopd_jax.evals.results import Result, on_questions

FileRow = dict[str, Any]  # one row of a run's files
ModelResults = tuple[list[Result], list[Result], list[Result]]  # of general teacher, specialised teacher and student
Column = tuple[str, str]  # ("recovery" or "retention", benchmark or "mean")
TEACHERS = ("general", "specialised")  # names in eval.jsonl; every other model there is a student


@dataclass(frozen=True)
class LoadedRun:
    """The contents of a run's work directory. A list is empty if its file does not exist."""

    config: dict[str, Any]
    metrics: list[FileRow]
    gap_masses: list[FileRow]  # quantiles of the answers' gap mass, for each step and branch
    samples: list[FileRow]
    evaluations: list[FileRow]
    diagnostics: list[FileRow]
    trials: list[FileRow]  # of the student's start
    exported: bool

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def ended(self) -> bool:
        return self.exported or (self.final is not None and self.final[0] == self.steps == self.config["steps"])

    @functools.cached_property
    def parts(self) -> list[str]:
        """Names of the branches, those of the config first, then other phases such as "mixed" or "sft"."""
        names = dict.fromkeys(self.config.get("branches") or ())
        names |= dict.fromkeys(row["phase"] for row in (*self.samples, *self.gap_masses))
        for row in self.metrics:
            names |= {name: None for name, block in row.items() if isinstance(block, dict) and "gap_mean" in block}
        return list(names | dict.fromkeys(row["phase"] for row in self.metrics))

    def rows_of(self, part: str) -> Iterator[FileRow]:
        """The metrics of a branch or phase: rows of its steps, and its objects in rows of mixed steps."""
        for row in (*self.metrics, *self.gap_masses):
            if row["phase"] == part:
                yield row
            elif isinstance(row.get(part), dict):
                yield row[part] | {"step": row["step"]}

    @property
    def standings(self) -> list[FileRow]:
        """The rows with recovery and retention during training."""
        return [row for row in self.evaluations if row["benchmark"] == "standing"]

    @functools.cached_property
    def final(self) -> tuple[int, ModelResults] | None:
        """Step and results of the model that was exported or evaluated last.

        All results of a benchmark are on the same questions. None if a result of the student or a teacher is missing.
        """
        names = [benchmark["name"] for benchmark in self.config["evaluation"]["benchmarks"]]
        teachers: dict[tuple[str, str], Result] = {}
        students: dict[int, dict[str, Result]] = {}
        for row in self.evaluations:
            if row["model"] in TEACHERS:
                teachers[row["model"], row["benchmark"]] = row
            elif row["benchmark"] in names:
                students.setdefault(row["step"], {})[row["benchmark"]] = row
        complete = [step for step, rows in students.items() if len(rows) == len(names)]
        if not complete or any((teacher, name) not in teachers for teacher in TEACHERS for name in names):
            return None
        step = max(complete)
        if self.exported and self.config["checkpoints"]["export"] == "best":
            best = max(self.standings, key=lambda row: (rank_of(row), row["step"]), default={})
            step = best["step"] if best.get("step") in complete else step
        student = [students[step][name] for name in names]
        general, specialised = (
            [on_questions(teachers[teacher, row["benchmark"]], range(row["n"])) for row in student]
            for teacher in TEACHERS
        )
        return step, (general, specialised, student)


@dataclass(frozen=True)
class Group:
    """One line of a figure: a single run, or a grid's runs of one method with one setting, by seed."""

    name: str
    method: str | None  # a name in config/methods.py
    grid: str  # the grid's folder; "": a single run
    runs: dict[int, LoadedRun]
    setting: float | None = None  # the learning rate; for the interpolation, the original model's weight

    @property
    def run(self) -> LoadedRun:
        return next(iter(self.runs.values()))

    @property
    def distinct(self) -> list[LoadedRun]:
        """The runs without duplicates; the interpolation has the same run for all seeds."""
        return list({id(run): run for run in self.runs.values()}.values())

    @property
    def about(self) -> str:
        """The description of the method."""
        return METHODS[self.method].about if self.method in METHODS else ""

    @functools.cached_property
    def results(self) -> dict[int, ModelResults]:
        """The final results by seed. Results of a grid exclude the questions for tuning."""
        finals = {seed: run.final[1] for seed, run in self.runs.items() if run.final}
        return {seed: _without_tuning(models) for seed, models in finals.items()} if self.grid else finals

    @property
    def single(self) -> ModelResults | None:
        """The results, if only one model has results."""
        evaluated = [run for run in self.distinct if run.final]
        return next(iter(self.results.values())) if len(evaluated) == 1 else None

    def values(self, column: Column) -> dict[int, tuple[float, float]]:
        """Recovery or retention by seed, with its standard error over questions."""
        measure, name = column
        by_seed = {seed: comparison(*models)[measure].get(name) for seed, models in self.results.items()}
        return {seed: (value[0], value[1]) for seed, value in by_seed.items() if value}

    def estimate(self, column: Column) -> Mean | None:
        """The mean over seeds, or a single model's value with its error over questions; None if there is no value."""
        values = self.values(column)
        if not values:
            return None
        if self.single:
            questions = sum(row["n"] for row in self.single[-1] if column[1] in ("mean", row["benchmark"]))
            return Mean(*next(iter(values.values())), questions)
        return study.mean(value for value, _ in values.values())


def _without_tuning(models: ModelResults) -> ModelResults:
    general, specialised, student = (
        [on_questions(row, [i for i in range(row["n"]) if not study.is_tuning_question(i)]) for row in rows]
        for rows in models
    )
    return general, specialised, student


@dataclass(frozen=True)
class Directory:
    """The contents of a directory given to `report`."""

    folder: epath.Path
    state: str  # kind and progress, as text
    groups: list[Group]
    study: dict[str, Any] = field(default_factory=dict)  # study.json of a finished grid
    merits: dict[str, dict[str, float]] = field(default_factory=dict)  # by method and setting
    interpolation: list[Group] = field(default_factory=list)  # of a grid, by the original model's weight
