"""Correlations of an answer's gap mass with its length, difficulty and prompt source, and statistics of the selection.

A table is the result of `method.statistics.answer_table` for a batch of answers, as lists. selection.jsonl has one for
each step and branch. The gap mass decreases in training, so correlations are computed within a batch.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

AnswerTable = dict[str, Any]  # lists of equal length: {"index", "score" (the gap mass), "selected", "length", ...}
# An estimate and the ends of its 95 % confidence interval, which are None for a single observation
Interval = tuple[float, float | None, float | None]

FEATURES = ("length", "truncated", "entropy", "student_loss", "teacher_loss")
SOURCE = "source: "  # prefix of features that stand for a prompt source


def correlation(masses: Sequence[float], feature: Sequence[float]) -> Interval | None:
    """Spearman's rank correlation with the interval of Bonett and Wright (2000); None if one argument is constant."""
    if len(masses) < 4 or len(set(masses)) == 1 or len(set(feature)) == 1:
        return None
    rho = float(stats.spearmanr(masses, feature).statistic)
    if abs(rho) > 1 - 1e-12:
        return rho, rho, rho
    half_width = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(masses) - 3))
    return rho, math.tanh(math.atanh(rho) - half_width), math.tanh(math.atanh(rho) + half_width)


def correlations(table: AnswerTable, sources: Sequence[str] | None = None) -> dict[str, Interval]:
    """Correlations of the gap mass with each feature of the answers of one batch.

    Args:
      sources: the source of each prompt in the prompt file. If given, "prompt is from this source" is a feature for
        each source.
    """
    features = {name: table[name] for name in FEATURES}
    if sources is not None:
        of_answer = [sources[i] for i in table["index"]]
        features |= {SOURCE + name: [s == name for s in of_answer] for name in sorted(set(of_answer))}
    intervals = {name: correlation(table["score"], feature) for name, feature in features.items()}
    return {name: interval for name, interval in intervals.items() if interval is not None}


def over_steps(tables: Iterable[AnswerTable], sources: Sequence[str] | None = None) -> dict[str, Interval]:
    """The mean over steps of each step's correlations, with a t interval over steps."""
    return _means([correlations(table, sources) for table in tables], lambda interval: interval[0])


def lengths(tables: Iterable[AnswerTable]) -> dict[str, Interval]:
    """Means over steps of the lengths in tokens: of the selected answers, of all answers, and the difference."""
    rows = []
    for table in tables:
        length, selected = np.asarray(table["length"]), np.asarray(table["selected"], bool)
        if selected.any():
            of_selected, of_all = float(length[selected].mean()), float(length.mean())
            rows.append({"selected": of_selected, "all": of_all, "difference": of_selected - of_all})
    return _means(rows, float)


def rates_by_source(tables: Iterable[AnswerTable], sources: Sequence[str]) -> dict[str, Interval]:
    """The share of each source's answers that were selected, with Wilson's interval."""
    of_source: dict[str, list[bool]] = {}
    for table in tables:
        for index, selected in zip(table["index"], table["selected"], strict=True):
            of_source.setdefault(sources[index], []).append(bool(selected))
    return {name: _share(sum(answers), len(answers)) for name, answers in sorted(of_source.items())}


def repeats(tables: Iterable[AnswerTable]) -> dict[str, Any]:
    """How often the same prompts are selected during training.

    Returns:
      prompts: number of different prompts. asked, selected: how often a prompt was used and selected, on average.
      never, always: shares of the prompts used at least twice that were never or always selected. again, anew: shares
      of answers selected if the previous answer to the prompt was, or was not, selected; None if there are no such
      answers. The two are similar if the selection does not depend on the prompt.
    """
    history: dict[int, list[bool]] = {}
    for table in tables:
        for index, selected in zip(table["index"], table["selected"], strict=True):
            history.setdefault(index, []).append(bool(selected))
    repeated = [times for times in history.values() if len(times) > 1]
    pairs = [pair for times in repeated for pair in itertools.pairwise(times)]

    def after(before: bool) -> Interval | None:
        following = [now for was, now in pairs if was == before]
        return _share(sum(following), len(following)) if following else None

    return {
        "prompts": len(history),
        "asked": _mean(len(times) for times in history.values()),
        "selected": _mean(sum(times) for times in history.values()),
        "never": _mean(not any(times) for times in repeated),
        "always": _mean(all(times) for times in repeated),
        "again": after(True),
        "anew": after(False),
    }


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _means(rows: Sequence[dict[str, Any]], value: Callable[[Any], float]) -> dict[str, Interval]:
    """The mean of each key over the rows that have it, with a t interval; None ends for a single row."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, entry in row.items():
            columns.setdefault(name, []).append(value(entry))
    return {name: _t_interval(values) for name, values in columns.items()}


def _t_interval(values: Sequence[float]) -> Interval:
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, None, None
    half_width = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half_width, mean + half_width


def _share(count: int, n: int) -> Interval:
    interval = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    return count / n, float(interval.low), float(interval.high)
