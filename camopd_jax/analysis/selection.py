"""What the selection follows: how an answer's score correlates with its length, its difficulty and its prompt.

A table is what `method.statistics.answer_table` returns for a batch of answers, as lists; selection.jsonl holds one for
each step and branch. Scores fall while a model learns, so answers are ranked among those of their own batch.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

AnswerTable = dict[str, Any]  # {"index", "score", "selected", "length", ...: lists of one length}
# An estimate and the ends of its 95 % confidence interval, None where a single observation gives no error
Interval = tuple[float, float | None, float | None]

FEATURES = ("length", "truncated", "entropy", "student_loss", "teacher_loss")
SOURCE = "source: "  # before a prompt source's name, among the features


def correlation(scores: Sequence[float], feature: Sequence[float]) -> Interval | None:
    """Spearman's rank correlation, with the interval of Bonett and Wright (2000); None where one side does not vary."""
    if len(scores) < 4 or len(set(scores)) == 1 or len(set(feature)) == 1:
        return None
    rho = float(stats.spearmanr(scores, feature).statistic)
    if abs(rho) > 1 - 1e-12:
        return rho, rho, rho
    half_width = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(scores) - 3))
    return rho, math.tanh(math.atanh(rho) - half_width), math.tanh(math.atanh(rho) + half_width)


def correlations(table: AnswerTable, sources: Sequence[str] | None = None) -> dict[str, Interval]:
    """Correlations of the score with each feature of the answers of one batch.

    Args:
      sources: where each prompt of the source file comes from; each then is a feature too, true of its answers.
    """
    features = {name: table[name] for name in FEATURES}
    if sources is not None:
        of_answer = [sources[i] for i in table["index"]]
        features |= {SOURCE + name: [s == name for s in of_answer] for name in sorted(set(of_answer))}
    intervals = {name: correlation(table["score"], feature) for name, feature in features.items()}
    return {name: interval for name, interval in intervals.items() if interval is not None}


def over_steps(tables: Iterable[AnswerTable], sources: Sequence[str] | None = None) -> dict[str, Interval]:
    """The mean over steps of each step's correlations, with a t interval over the steps."""
    return _means([correlations(table, sources) for table in tables], lambda interval: interval[0])


def lengths(tables: Iterable[AnswerTable]) -> dict[str, Interval]:
    """Mean lengths in tokens over steps: of the selected answers, of all, and their difference within a step."""
    rows = []
    for table in tables:
        length, selected = np.asarray(table["length"]), np.asarray(table["selected"], bool)
        if selected.any():
            of_selected, of_all = float(length[selected].mean()), float(length.mean())
            rows.append({"selected": of_selected, "all": of_all, "difference": of_selected - of_all})
    return _means(rows, float)


def rates_by_source(tables: Iterable[AnswerTable], sources: Sequence[str]) -> dict[str, Interval]:
    """Share of each source's answers that were selected, with Wilson's interval."""
    of_source: dict[str, list[bool]] = {}
    for table in tables:
        for index, selected in zip(table["index"], table["selected"], strict=True):
            of_source.setdefault(sources[index], []).append(bool(selected))
    return {name: _share(sum(answers), len(answers)) for name, answers in sorted(of_source.items())}


def repeats(tables: Iterable[AnswerTable]) -> dict[str, Any]:
    """How often the same prompts are selected over training.

    Returns:
      prompts: how many came. asked, selected: how often each came and was selected, on average. never, always: of the
      prompts that came at least twice, the share never or always selected. again, anew: share selected of the answers
      to prompts that were, or were not, selected the time before; None without any. Where the selection does not
      depend on the prompt, the two are alike.
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
    """The mean of each key over the rows that have it, with a t interval; a single row has none."""
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
