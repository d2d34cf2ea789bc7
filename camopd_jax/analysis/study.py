"""Statistics of methods over seeds: recovery and retention, and paired tests of differences between methods.

A run's outcome is a number for each benchmark: recovery on a general one, retention on a domain one
(`evals.comparison`). Runs with the same seed use the same prompts in the same order, so differences are paired by seed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from scipy import special

from camopd_jax.evals.comparison import kept_share, recovered_share
from camopd_jax.evals.results import Result, on_questions

Shares = dict[str, float]  # by benchmark
TUNING_SEED = 1000  # seed of the runs that choose a learning rate
TUNING_EVERY = 4  # one in this many questions is used to choose settings; results are on the other questions


def is_tuning_question(number: int) -> bool:
    """Whether a question is used to choose settings, not to measure results."""
    return number % TUNING_EVERY == 0


def shares(models: Sequence[Sequence[Result]], for_tuning: bool) -> Shares:
    """Recovery or retention on each benchmark, for the questions that choose settings or for the others.

    Args:
      models: results of the general teacher, the specialised model and a student on the same benchmarks.
    """
    of_benchmark = {}
    for rows in zip(*models, strict=True):
        chosen = [i for i in range(rows[0]["n"]) if is_tuning_question(i) == for_tuning]
        general, specialised, student = ([on_questions(row, chosen)] for row in rows)
        if rows[0]["axis"] == "general":
            share = recovered_share(general, specialised, student)
        else:
            share = kept_share(specialised, student)
        of_benchmark[rows[0]["benchmark"]] = math.nan if share is None else share.value
    return of_benchmark


def merit(of_run: Shares, axes: dict[str, str]) -> float:
    """The criterion for settings: the average of mean recovery and mean retention."""
    means = [np.mean([of_run[name] for name in axes if axes[name] == axis]) for axis in set(axes.values())]
    return float(np.mean(means))


def sampled_tokens(steps: Sequence[dict[str, Any]]) -> int:
    """The number of tokens in all answers of a run, from its metrics."""
    return sum(row.get("response_tokens") or 0 for row in steps)


def run_seconds(steps: Sequence[dict[str, Any]]) -> float:
    """The seconds of a run's steps, from its metrics: for each kind of step (`phase`) their number times their median.

    So the compilation in the first steps does not count, nor does a step that another program delayed.
    """
    seconds: dict[str, list[float]] = {}
    for row in steps:
        seconds.setdefault(row.get("phase", ""), []).append(sum(row.get("seconds", {}).values()))
    return float(sum(len(of_phase) * np.median(of_phase) for of_phase in seconds.values()))


@dataclass(frozen=True)
class Mean:
    """A mean over n values, usually seeds. `error` is the standard error; None for a single value."""

    value: float
    error: float | None
    n: int


def mean(values: Iterable[float]) -> Mean:
    values = list(values)
    n = len(values)
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None, n)


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods on a benchmark, paired by seed. `p`: two-sided t-test; None if error is 0."""

    value: float
    error: float
    p: float | None


def difference(first: dict[int, float], second: dict[int, float]) -> Difference | None:
    """`first - second` over the seeds that both have; None with fewer than two."""
    seeds = sorted(first.keys() & second.keys())
    n = len(seeds)
    if n < 2:
        return None
    differences = np.asarray([first[seed] - second[seed] for seed in seeds])
    value, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Difference(value, error, 2 * float(special.stdtr(n - 1, -abs(value) / error)) if error else None)


def half_width(error: float, n: int, level: float = 0.95) -> float:
    """Half the width of the confidence interval of a mean of n values with this standard error (Student's t)."""
    return float(special.stdtrit(n - 1, (1 + level) / 2)) * error


def methods_table(
    outcomes: dict[str, dict[int, Shares]], axes: dict[str, str], against: Sequence[str], notes: dict[str, str]
) -> Table:
    """A table with a row for each method: recovery and retention in %, and differences from the methods in `against`.

    Args:
      outcomes: by method and seed. axes: of each benchmark. notes: of each method, its setting and (`cost_note`) cost.
    """
    view = Table(
        title="In %, ± one standard error over seeds: back, of the lost ability; kept, of the domain",
        caption=f"below each: less that of {', then of '.join(against)}; *: p < 0.05 in a paired t-test over seeds, "
        "**: also after Bonferroni's correction for the table's rows; cost: answer tokens and seconds of one run, mean "
        "over seeds, without compilation and evaluation",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    view.add_column("", no_wrap=True)
    view.add_column("setting, cost", justify="right")
    for name, axis in axes.items():
        view.add_column(f"{name}, {'back' if axis == 'general' else 'kept'}", justify="right")
    for method, of_seeds in outcomes.items():
        if not of_seeds:  # all runs of the method failed
            continue
        cells = []
        for name in axes:
            by_method = {
                other: {seed: values[name] for seed, values in runs.items()} for other, runs in outcomes.items()
            }
            own = by_method[method]
            differences = [
                _difference_cell(difference(own, by_method[other]), len(outcomes))
                if other in outcomes and other != method
                else "-"
                for other in against
            ]
            cells.append(f"{_mean_cell(mean(own.values()))}\n{' '.join(differences)}")
        view.add_row(method, notes.get(method, ""), *cells)
    return view


def cost_note(method: str, facts: dict[str, Any]) -> str:
    """A method's mean tokens and seconds for its note, from the contents of study.json.

    >>> cost_note("a", {"tokens": {"a/0": 69_000, "a/1": 71_000, "ab/0": 1}, "run_seconds": {"a/0": 8.1, "a/1": 8.3}})
    '70k, 8 s'
    """
    tokens, seconds = (
        [value for cell, value in facts[cost].items() if cell.split("/")[0] == method]
        for cost in ("tokens", "run_seconds")
    )
    return f"{np.mean(tokens) / 1000:.0f}k, {np.mean(seconds):.0f} s" if tokens else "-"


def _mean_cell(of_seeds: Mean) -> str:
    return f"{100 * of_seeds.value:.1f}" + ("" if of_seeds.error is None else f" ± {100 * of_seeds.error:.1f}")


def _difference_cell(apart: Difference | None, comparisons: int) -> str:
    if apart is None:
        return "-"
    stars = "" if apart.p is None or apart.p >= 0.05 else "**" if apart.p < 0.05 / comparisons else "*"
    return f"{100 * apart.value:+.1f}{stars}"
