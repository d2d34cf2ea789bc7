"""Compares a student's results with those of the general and the specialised model, and ranks checkpoints.

`recovered_share` is the share of the lost general ability that the student has recovered, and `kept_share` is the share
of the domain ability that it has kept. All models must have answered the same questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from camopd_jax.evals.results import AXES, Result, on_axis


@dataclass(frozen=True)
class Ratio:
    """A ratio of mean accuracies, and its standard error over questions."""

    value: float
    error: float


def recovered_share(
    general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]
) -> Ratio | None:
    """`(student - specialised) / (general - specialised)` of mean accuracies; None if the denominator is 0.

    The standard error is linearised (delta method) and paired by question: it is the standard error of the mean of
    `student - specialised - share * (general - specialised)`, divided by the denominator.
    """
    g, p, s = (_mean_accuracy(results) for results in (general, specialised, student))
    if not student or g == p:
        return None
    share = (s - p) / (g - p)
    residuals = [
        _grades(s) - _grades(p) - share * (_grades(g) - _grades(p))
        for g, p, s in zip(general, specialised, student, strict=True)
    ]
    return Ratio(share, _error(residuals) / abs(g - p))


def kept_share(specialised: Sequence[Result], student: Sequence[Result]) -> Ratio | None:
    """`student / specialised` of mean accuracies, with its error paired by question; None if `specialised` is 0."""
    p, s = _mean_accuracy(specialised), _mean_accuracy(student)
    if not student or p == 0:
        return None
    residuals = [_grades(of_s) - s / p * _grades(of_p) for of_p, of_s in zip(specialised, student, strict=True)]
    return Ratio(s / p, _error(residuals) / p)


def _mean_accuracy(results: Sequence[Result]) -> float:
    return sum(result["accuracy"] for result in results) / max(1, len(results))


def _grades(result: Result) -> np.ndarray:
    return np.asarray(result["scores"])


def _error(residuals: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over benchmarks of the mean residual."""
    variances = [np.var(r, ddof=1) / len(r) if len(r) > 1 else 0.0 for r in residuals]
    return float(np.sqrt(np.sum(variances))) / len(residuals)


def comparison(
    general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]
) -> dict[str, dict[str, list[float]]]:
    """Both shares for every benchmark and for the mean of each axis, if they are defined.

    Returns:
      {"recovery": {benchmark or "mean": [value, standard error]}, "retention": the same}, as eval.jsonl has them.
    """
    models = (general, specialised, student)
    on_general, on_domain = ([on_axis(results, axis) for results in models] for axis in AXES)
    return {
        "recovery": _by_benchmark(recovered_share, on_general),
        "retention": _by_benchmark(kept_share, on_domain[1:]),
    }


def _by_benchmark(share: Callable[..., Ratio | None], models: Sequence[Sequence[Result]]) -> dict[str, list[float]]:
    """`share` of the models' results on each benchmark, and on all benchmarks as "mean"."""
    ratios = {result["benchmark"]: share(*([model[i]] for model in models)) for i, result in enumerate(models[-1])}
    ratios["mean"] = share(*models)
    return {name: [ratio.value, ratio.error] for name, ratio in ratios.items() if ratio is not None}


# -------------------------------------------------------------------------- which checkpoint is best


@dataclass(frozen=True, order=True)
class Rank:
    """The rank of a checkpoint; the better of two checkpoints has the greater rank."""

    keeps_domain: bool  # whether its kept share is at least 1 minus one standard error
    value: float  # its recovered share if it keeps the domain, else its kept share


def rank_student(general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]) -> Rank | None:
    """A student's rank: students that keep the domain rank first, by recovered share; the others by kept share.

    Without domain benchmarks, every student keeps the domain. Without general benchmarks, or if no ability was lost,
    the rank is by kept share. Without any benchmarks, the rank is None.
    """
    recovered = recovered_share(*(on_axis(results, "general") for results in (general, specialised, student)))
    kept = kept_share(*(on_axis(results, "domain") for results in (specialised, student)))
    keeps_domain = kept is None or kept.value >= 1 - kept.error
    share = recovered if keeps_domain and recovered is not None else kept
    return None if share is None else Rank(keeps_domain, share.value)


def out_of_patience(ranks: Sequence[Rank], patience: int) -> bool:
    """Whether none of the last `patience` ranks is better than all earlier ones; patience 0: never."""
    if not 0 < patience < len(ranks):
        return False
    return max(ranks[-patience:]) <= max(ranks[:-patience])


def rank_row(step: int, rank: Rank, shares: dict[str, Any]) -> Result:
    """The row of eval.jsonl with a checkpoint's rank.

    Args:
      shares: more fields of the row, from `comparison`.
    """
    return {
        "step": step,
        "model": "student",
        "benchmark": "standing",
        "keeps": rank.keeps_domain,
        "merit": rank.value,
        **shares,
    }


def ranks(rows: Sequence[Result]) -> dict[int, Rank]:
    """The ranks of a run's checkpoints by step, from the rows of its eval.jsonl."""
    return {row["step"]: rank_of(row) for row in rows if row["benchmark"] == "standing"}


def rank_of(row: Result) -> Rank:
    """The inverse of `rank_row`."""
    return Rank(row["keeps"], row["merit"])
