"""Scores of one model on one benchmark, and the table that sets models side by side."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from camopd_jax.config import Benchmark
from camopd_jax.evals.graders import GRADERS

Result = dict[str, Any]


def result(benchmark: Benchmark, references: Sequence[str], texts: Sequence[str], lengths: Sequence[int],
           stopped: Sequence[bool]) -> Result:  # fmt: skip
    """Grades one answer to each question.

    Returns:
      accuracy, its standard error over questions, n, the share without the form asked for
      ("unmarked"), the share cut at the cap ("truncated"), and the mean length in tokens.
    """
    grades = [GRADERS[benchmark.grader](t, str(r)) for t, r in zip(texts, references, strict=True)]
    n = len(grades)
    accuracy = sum(g.correct for g in grades) / n
    return {
        "benchmark": benchmark.name,
        "axis": benchmark.axis,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / max(1, n - 1)),
        "n": n,
        "unmarked": sum(not g.marked for g in grades) / n,
        "truncated": sum(not s for s in stopped) / n,
        "length_mean": sum(lengths) / n,
    }


def axis_mean(results: Sequence[Result], axis: str) -> tuple[float, float] | None:
    """Mean accuracy over an axis's benchmarks, and its standard error; None without any."""
    part = [r for r in results if r["axis"] == axis]
    if not part:
        return None
    mean = sum(r["accuracy"] for r in part) / len(part)
    return mean, math.sqrt(sum(r["standard_error"] ** 2 for r in part)) / len(part)


def recovery(general: float, specialised: float, student: float) -> float | None:
    """`(student - specialised) / (general - specialised)`; None where nothing was lost."""
    return None if general == specialised else (student - specialised) / (general - specialised)


def retention(specialised: float, student: float) -> float | None:
    """`student / specialised`; None where there was nothing to keep."""
    return None if specialised == 0 else student / specialised


def table(general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]) -> Table:
    """Accuracy in % of the three models: each benchmark, then the mean of each axis with recovery and retention."""
    view = Table(
        title="Accuracy in %, ± one standard error",
        caption="back: share of the lost general ability regained; kept: share of the domain's accuracy",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "general teacher", "specialised", "recovered", "back", "kept"):
        view.add_column(name, justify="right" if name else "left")

    def row(name: str, axis: str, scores: list[tuple[float, float]], style: str = "") -> None:
        g, s, r = (score[0] for score in scores)
        share = recovery(g, s, r) if axis == "general" else None
        kept = retention(s, r) if axis == "domain" else None
        cells = [f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in scores]
        view.add_row(name, *cells, *("" if x is None else f"{100 * x:.0f} %" for x in (share, kept)), style=style)

    models = (general, specialised, student)
    for axis in ("general", "domain"):
        names = [r["benchmark"] for r in general if r["axis"] == axis]
        for name in names:
            picked = [next(r for r in results if r["benchmark"] == name) for results in models]
            row(f"{axis}: {name}", axis, [(r["accuracy"], r["standard_error"]) for r in picked])
        if len(names) > 1:
            row(f"{axis}: mean", axis, [axis_mean(results, axis) for results in models], style="bold")
    return view
