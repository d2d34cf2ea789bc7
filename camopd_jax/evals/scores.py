"""Scores of models on benchmarks: one model's, recovery and retention between models, and the table of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals.task import Grade

Result = dict[str, Any]
AXES = ("general", "domain")
TITLES = {"general": "general teacher", "student": "recovered"}


@dataclass(frozen=True)
class Share:
    """A ratio of scores and its standard error, over questions."""

    value: float
    error: float


def result(
    benchmark: Benchmark, grades: Sequence[Sequence[Grade]], lengths: Sequence[int], stopped: Sequence[bool]
) -> Result:
    """One model's scores on one benchmark.

    Args:
      grades: of each question, those of its answers.
      lengths: tokens of all answers. stopped: whether they ended by themselves.

    Returns (rows of eval.jsonl; "asked", which evaluation.py adds, tells the questions and sampling apart):
      accuracy: mean over questions of the mean score of a question's answers (mean@n), in [0, 1].
      standard_error: of that mean, over questions.
      scores: of each question. n: questions. samples: answers to each.
      unmarked, truncated: the shares of answers without the form asked for, and cut at the cap.
      length_mean: tokens of an answer. parts: further shares by name, pooled over answers.
      temperature, top_k, top_p, min_p, max_response_tokens: how the answers were sampled.
    """
    answers = [grade for of_question in grades for grade in of_question]
    names = sorted({name for grade in answers for name in grade.parts})
    pooled = {name: [grade.parts[name] for grade in answers if name in grade.parts] for name in names}
    settings = ("samples", "temperature", "top_k", "top_p", "min_p", "max_response_tokens")
    return {
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "axis": benchmark.axis,
        **_mean([sum(grade.score for grade in of_question) / len(of_question) for of_question in grades]),
        "unmarked": sum(not grade.marked for grade in answers) / len(answers),
        "truncated": sum(not ended for ended in stopped) / len(answers),
        "length_mean": sum(lengths) / len(answers),
        "parts": {name: sum(right for right, _ in part) / sum(of for _, of in part) for name, part in pooled.items()},
        **{name: getattr(benchmark, name) for name in settings},
    }


def _mean(scores: Sequence[float]) -> Result:
    n = len(scores)
    error = float(np.std(scores, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return {"accuracy": sum(scores) / n, "standard_error": error, "n": n, "scores": list(scores)}


def some(row: Result, questions: Sequence[int]) -> Result:
    """The result on some of the questions alone. Its other figures stay those of all."""
    return row | _mean([row["scores"][i] for i in questions])


def axis_mean(results: Sequence[Result], axis: str) -> tuple[float, float] | None:
    """Mean accuracy over an axis's benchmarks, and its standard error; None without any."""
    part = [r for r in results if r["axis"] == axis]
    if not part:
        return None
    mean = sum(r["accuracy"] for r in part) / len(part)
    return mean, math.sqrt(sum(r["standard_error"] ** 2 for r in part)) / len(part)


# ------------------------------------------------------------------------ recovery and retention


def recovery(general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]) -> Share | None:
    """`(student - specialised) / (general - specialised)` of mean accuracies; None where nothing was lost.

    The three answered the same questions. The error is that of the ratio, linearised (delta method) and paired by
    question: of `student - specialised - recovery * (general - specialised)`.
    """
    g, p, s = (_accuracy(results) for results in (general, specialised, student))
    if not student or g == p:
        return None
    value = (s - p) / (g - p)
    residuals = [
        _scores(s) - _scores(p) - value * (_scores(g) - _scores(p))
        for g, p, s in zip(general, specialised, student, strict=True)
    ]
    return Share(value, _error(residuals) / abs(g - p))


def retention(specialised: Sequence[Result], student: Sequence[Result]) -> Share | None:
    """`student / specialised` of mean accuracies, with its paired error; None where there was nothing to keep."""
    p, s = _accuracy(specialised), _accuracy(student)
    if not student or p == 0:
        return None
    residuals = [_scores(s_) - s / p * _scores(p_) for p_, s_ in zip(specialised, student, strict=True)]
    return Share(s / p, _error(residuals) / p)


def _accuracy(results: Sequence[Result]) -> float:
    return sum(r["accuracy"] for r in results) / max(1, len(results))


def _scores(row: Result) -> np.ndarray:
    return np.asarray(row["scores"])


def _error(residuals: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over benchmarks of the mean residual."""
    variances = [np.var(r, ddof=1) / len(r) if len(r) > 1 else 0.0 for r in residuals]
    return float(np.sqrt(np.sum(variances))) / len(residuals)


def on_axis(results: Sequence[Result], axis: str) -> list[Result]:
    return [r for r in results if r["axis"] == axis]


def comparison(
    general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]
) -> dict[str, dict[str, list[float]]]:
    """{"recovery": {benchmark or "mean": [value, standard error]}, "retention": ...}, of what has one."""
    by_axis = {axis: [on_axis(results, axis) for results in (general, specialised, student)] for axis in AXES}

    def shares(measure, models) -> dict[str, list[float]]:
        named = {row["benchmark"]: measure(*([model[i]] for model in models)) for i, row in enumerate(models[-1])}
        named["mean"] = measure(*models)
        return {name: [share.value, share.error] for name, share in named.items() if share is not None}

    return {
        "recovery": shares(recovery, by_axis["general"]),
        "retention": shares(retention, by_axis["domain"][1:]),
    }


@dataclass(frozen=True, order=True)
class Standing:
    """What decides which checkpoint is best. Standings compare: the better is greater."""

    keeps: bool  # its retention is at least 1 less one standard error
    merit: float  # recovery where it keeps, retention where it does not


def standing(general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]) -> Standing | None:
    """The highest recovery wins, among those that keep the domain; None without benchmarks.

    Without a domain benchmark every student keeps it; without a general one, or where nothing was lost, the
    retention decides.
    """
    back = recovery(*(on_axis(results, "general") for results in (general, specialised, student)))
    kept = retention(*(on_axis(results, "domain") for results in (specialised, student)))
    if back is None and kept is None:
        return None
    keeps = kept is None or kept.value >= 1 - kept.error
    return Standing(keeps, back.value if keeps and back is not None else kept.value)


def out_of_patience(standings: Sequence[Standing], patience: int) -> bool:
    """Whether none of the last `patience` standings is better than all before them."""
    if not 0 < patience < len(standings):
        return False
    return max(standings[-patience:]) <= max(standings[:-patience])


# ------------------------------------------------------------------------------------- table


def table(models: dict[str, Sequence[Result]]) -> Table:
    """Accuracy in % of models side by side: each benchmark, then the mean of each axis.

    Where the models "general" and "specialised" are among them, every other one is followed by what it got back of
    the lost general ability (general benchmarks) or kept of the domain (domain benchmarks).
    """
    compares = {"general", "specialised"} <= models.keys()
    students = [name for name in models if compares and name not in ("general", "specialised")]
    view = Table(
        title="Accuracy in %, ± one standard error over questions",
        caption="back: share of the lost general ability regained; kept: share of the domain's" if students else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    view.add_column("")
    for name in models:
        view.add_column(TITLES.get(name, name), justify="right")
        if name in students:
            view.add_column("back | kept", justify="right")

    def add(title: str, axis: str, rows: dict[str, list[Result]], style: str = "") -> None:
        cells = []
        for name, part in rows.items():
            mean, error = axis_mean(part, axis)
            cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
            if name in students:
                before = rows["specialised"]
                share = recovery(rows["general"], before, part) if axis == "general" else retention(before, part)
                cells.append("" if share is None else f"{100 * share.value:.0f} ± {100 * share.error:.0f} %")
        view.add_row(title, *cells, style=style)

    for axis in AXES:
        on = {name: on_axis(results, axis) for name, results in models.items()}
        names = [r["benchmark"] for r in next(iter(on.values()))]
        for i, name in enumerate(names):
            add(f"{axis}: {name}", axis, {model: [part[i]] for model, part in on.items()})
        if len(names) > 1:
            add(f"{axis}: mean", axis, on, style="bold")
    return view


def details(models: dict[str, Sequence[Result]]) -> Table:
    """What an accuracy does not tell: how each benchmark was asked, and under it how each model answered."""
    view = Table(
        title="Answers: tokens on average; in %: cut at the cap, without the form asked for",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "tokens", "cut", "no form", "also, in %"):
        view.add_column(name, justify="left" if name in ("", "also, in %") else "right")
    for rows in zip(*models.values(), strict=True):
        asked = rows[0]
        view.add_row(f"{asked['benchmark']}: {asked['n']} questions", style="bold")
        view.add_row(f"{_sampling(asked)}, at most {asked['max_response_tokens']} tokens", style="dim")
        for model, r in zip(models, rows, strict=True):
            also = ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in r["parts"].items())
            shares = (f"{100 * r[name]:.0f}" for name in ("truncated", "unmarked"))
            view.add_row(f"  {TITLES.get(model, model)}", f"{r['length_mean']:.0f}", *shares, also)
    return view


def _sampling(r: Result) -> str:
    if r["task"] == "likelihood":
        return "given answers"
    if r["temperature"] == 0:
        return "greedy"
    filters = [f"{name} {r[name]:g}" for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)) if r[name] != off]
    return ", ".join([f"{r['samples']} at T {r['temperature']:g}", *filters])
