"""Figures over the steps of runs: one branch's or one phase's, in bins, pooled over seeds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from camopd_jax.analysis import study
from camopd_jax.method.loop import BRANCHES
from camopd_jax.reporting.runs import Row, Run, standings

BINS = 60  # points of a line at most: what a small figure can show
RATE_BINS = 12  # of what is yes or no in a step, or rare: shares need many steps
Points = list[tuple[int, float]]  # step, value


@dataclass(frozen=True)
class Curve:
    """A line and, where it has one, the standard error of each of its points."""

    steps: list[float]
    values: list[float]
    errors: list[float | None]

    def __bool__(self) -> bool:
        return bool(self.steps)


def branch_points(run: Run, branch: str, key: str) -> Points:
    """A figure of one branch, from its own steps and from its part of mixed ones."""
    rows = [(row["step"], row if row["phase"] == branch else row.get(branch, {})) for row in run.metrics
            if row["phase"] in (branch, "mixed")]  # fmt: skip
    return _there((step, part.get(key)) for step, part in rows)


def phase_points(run: Run, phase: str, key: str) -> Points:
    """A figure of whole steps, of one phase; key "seconds.rollout" looks into a block."""
    block, _, name = key.rpartition(".")
    rows = ((row["step"], row.get(block, {}) if block else row) for row in run.metrics if row["phase"] == phase)
    return _there((step, part.get(name)) for step, part in rows)


def phases(runs: Iterable[Run]) -> list[str]:
    """The phases that runs had, in the order of the method."""
    found = {row["phase"] for run in runs for row in run.metrics}
    return [name for name in (*BRANCHES, "mixed") if name in found] + sorted(found - {*BRANCHES, "mixed"})


def diagnostic_points(run: Run, *path: str) -> Points:
    """A figure of diagnostics.jsonl, by the names of the blocks that hold it."""
    return _there((row["step"], _inside(row, path)) for row in run.diagnostics)


def _inside(row: Row, path: Sequence[str]) -> float | None:
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row if isinstance(row, int | float) else None


def _there(points: Iterable[tuple[int, float | None]]) -> Points:
    return [(step, value) for step, value in points if value is not None]  # null: was not finite


def standing_curve(run: Run, measure: str, benchmark: str) -> Curve:
    """Recovery or retention after the steps that were evaluated, with its error over questions."""
    found = [(row["step"], *row[measure][benchmark]) for row in standings(run) if benchmark in row.get(measure, {})]
    return Curve(*map(list, zip(*found, strict=True))) if found else Curve([], [], [])


def pooled(of_runs: Sequence[Points], at_most: int = BINS) -> Curve:
    """Means over bins of steps within each run, then over runs, with the standard error over runs.

    A bin holds one step while there are no more than `at_most` of them.
    """
    steps = sorted({step for points in of_runs for step, _ in points})
    if not steps:
        return Curve([], [], [])
    width = max(1, -(-len(steps) // at_most))
    bin_of = {step: i // width for i, step in enumerate(steps)}
    curve = Curve([], [], [])
    bins: list[list[float]] = [[] for _ in range(bin_of[steps[-1]] + 1)]
    for points in of_runs:
        own: dict[int, list[float]] = {}
        for step, value in points:
            own.setdefault(bin_of[step], []).append(value)
        for i, values in own.items():
            bins[i].append(sum(values) / len(values))
    for i, values in enumerate(bins):
        within = steps[i * width : (i + 1) * width]
        mean = study.mean(values)
        curve.steps.append(sum(within) / len(within))
        curve.values.append(mean.value)
        curve.errors.append(mean.error)
    return curve


def curve_of(runs: Sequence[Run], points: Callable[[Run], Points], at_most: int = BINS) -> Curve:
    return pooled([found for run in runs if (found := points(run))], at_most)


def standing_over(runs: Sequence[Run], measure: str, benchmark: str) -> Curve:
    """`standing_curve` of one run; over several, their mean and its error over them."""
    curves = [curve for run in runs if (curve := standing_curve(run, measure, benchmark))]
    if len(curves) == 1:
        return curves[0]
    return pooled([list(zip(curve.steps, curve.values, strict=True)) for curve in curves])
