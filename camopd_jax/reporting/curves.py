"""Curves over the steps of runs, averaged over bins of steps and over seeds."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from camopd_jax.analysis import study
from camopd_jax.reporting.runs import FileRow, LoadedRun

BINS = 60  # maximum number of points of a line
RATE_BINS = 12  # the same for rates of rare events, which need more steps per point
Points = list[tuple[float, float]]  # step, value


@dataclass(frozen=True)
class Curve:
    """The points of a line, with the standard error of each point if there is one."""

    steps: list[float]
    values: list[float]
    errors: list[float | None]


def points(rows: Iterable[FileRow], path: Sequence[str]) -> Points:
    """The values of rows at a path of keys; rows without a finite value are left out."""
    values: Points = []
    for row in rows:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        value = value[0] if isinstance(value, list) and value else value  # a list is an estimate and its interval
        if isinstance(value, int | float) and math.isfinite(value):
            values.append((row["step"], float(value)))
    return values


def average(of_runs: Sequence[Points], at_most: int = BINS) -> Curve:
    """Means over bins of steps in each run, then over runs, with the standard error over runs.

    A bin has one step if there are at most `at_most` steps.
    """
    steps = sorted({step for points in of_runs for step, _ in points})
    width = max(1, math.ceil(len(steps) / at_most))
    bins = [steps[i : i + width] for i in range(0, len(steps), width)]
    means = np.full((len(of_runs), len(bins)), np.nan)
    for row, points in zip(means, of_runs, strict=True):
        at, values = np.asarray(points).T
        bin_of = np.searchsorted([own[0] for own in bins], at, side="right") - 1
        counts = np.bincount(bin_of, minlength=len(bins))
        np.divide(np.bincount(bin_of, values, len(bins)), counts, out=row, where=counts > 0)
    over_runs = [study.mean(column[np.isfinite(column)]) for column in means.T]
    centres = [sum(own) / len(own) for own in bins]
    return Curve(centres, [mean.value for mean in over_runs], [mean.error for mean in over_runs])


Rows = Callable[[LoadedRun], Iterable[FileRow]]


def average_curve(runs: Sequence[LoadedRun], rows: Rows, path: Sequence[str], at_most: int = BINS) -> Curve:
    """The average over runs of the values at a path of keys in some of their rows."""
    return average([of_run for run in runs if (of_run := points(rows(run), path))], at_most)


def standing_curve(runs: Sequence[LoadedRun], measure: str, benchmark: str) -> Curve:
    """Recovery or retention during training: of one run with its error over questions, else the mean over runs."""
    of_runs = [[row for row in run.standings if benchmark in row.get(measure, {})] for run in runs]
    of_runs = [rows for rows in of_runs if rows]
    if len(of_runs) == 1:
        values, errors = zip(*(row[measure][benchmark] for row in of_runs[0]), strict=True)
        return Curve([row["step"] for row in of_runs[0]], list(values), list(errors))
    return average([[(row["step"], row[measure][benchmark][0]) for row in rows] for rows in of_runs])
