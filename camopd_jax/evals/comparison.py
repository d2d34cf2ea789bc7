"""A student's results beside those of the general and the specialised model, and which checkpoint is best.

`recovered_share` says how much of the general ability that the specialised model had lost is back, `kept_share` how
much of the domain ability is kept. All models answered the same questions.
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
    """`(student - specialised) / (general - specialised)` of mean accuracies; None if nothing was lost.

    The error is that of the ratio, linearised (delta method) and paired by question: of
    `student - specialised - share * (general - specialised)`.
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
    """`student / specialised` of mean accuracies, its error paired by question; None if there was nothing to keep."""
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
    """Both shares of every benchmark and of each axis's mean, as far as they are defined.

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
    """`share` of the models' results on each benchmark, and on all of them as "mean"."""
    ratios = {result["benchmark"]: share(*([model[i]] for model in models)) for i, result in enumerate(models[-1])}
    ratios["mean"] = share(*models)
    return {name: [ratio.value, ratio.error] for name, ratio in ratios.items() if ratio is not None}


# -------------------------------------------------------------------------- which checkpoint is best


@dataclass(frozen=True, order=True)
class Rank:
    """How good a checkpoint is. Ranks compare: the better is greater."""

    keeps_domain: bool  # whether its kept share is at least 1 less one standard error
    value: float  # its recovered share if it keeps the domain, else its kept share


def rank_student(general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]) -> Rank | None:
    """A student's rank: the highest recovered share is best, among those that keep the domain.

    Without a domain benchmark every student keeps it; without a general one, or where nothing was lost, the kept share
    decides. None without benchmarks.
    """
    recovered = recovered_share(*(on_axis(results, "general") for results in (general, specialised, student)))
    kept = kept_share(*(on_axis(results, "domain") for results in (specialised, student)))
    keeps_domain = kept is None or kept.value >= 1 - kept.error
    share = recovered if keeps_domain and recovered is not None else kept
    return None if share is None else Rank(keeps_domain, share.value)


def out_of_patience(ranks: Sequence[Rank], patience: int) -> bool:
    """Whether none of the last `patience` ranks is better than all before them; 0: never."""
    if not 0 < patience < len(ranks):
        return False
    return max(ranks[-patience:]) <= max(ranks[:-patience])


def rank_row(step: int, rank: Rank, shares: dict[str, Any]) -> Result:
    """The row of eval.jsonl that says how good a checkpoint is.

    Args:
      shares: further fields of the row, as `comparison` makes them.
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
    """The ranks of a run's checkpoints, by step, from the rows of its eval.jsonl."""
    return {row["step"]: rank_of(row) for row in rows if row["benchmark"] == "standing"}


def rank_of(row: Result) -> Rank:
    """The rank that a row made by `rank_row` holds."""
    return Rank(row["keeps"], row["merit"])
