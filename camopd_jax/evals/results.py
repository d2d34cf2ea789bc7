"""A model's result on a benchmark, which is a row of eval.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals.task import Grade

Result = dict[str, Any]
AXES = ("general", "domain")


def summarise(
    benchmark: Benchmark, grades: Sequence[Sequence[Grade]], lengths: Sequence[int], stopped: Sequence[bool]
) -> Result:
    """One model's result on one benchmark.

    Args:
      grades: for each question, the grades of its answers.
      lengths: tokens of each answer to all questions.
      stopped: whether each answer to all questions ended with EOS.

    Returns:
      A row of eval.jsonl:
        benchmark, task, axis: from the config.
        accuracy: mean over questions of the mean grade of a question's answers (mean@n), in [0, 1].
        standard_error: of accuracy, over questions.
        scores: the mean grade of each question. n: number of questions. samples: answers per question.
        unmarked, truncated: fractions of the answers without the required form, and cut at the maximum length.
        length_mean: tokens per answer. parts: additional fractions by name, pooled over answers.
        temperature, top_k, top_p, min_p, max_response_tokens: the sampling settings.
    """
    answers = [grade for of_question in grades for grade in of_question]
    settings = ("samples", "temperature", "top_k", "top_p", "min_p", "max_response_tokens")
    return {
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "axis": benchmark.axis,
        **_accuracy([sum(grade.value for grade in of_question) / len(of_question) for of_question in grades]),
        "unmarked": sum(not grade.marked for grade in answers) / len(answers),
        "truncated": sum(not ended for ended in stopped) / len(answers),
        "length_mean": sum(lengths) / len(answers),
        "parts": _pooled_parts(answers),
        **{name: getattr(benchmark, name) for name in settings},
    }


def _accuracy(values: Sequence[float]) -> Result:
    """The fields of a result that are computed from the value of each question."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return {"accuracy": sum(values) / n, "standard_error": error, "n": n, "scores": list(values)}


def _pooled_parts(grades: Sequence[Grade]) -> dict[str, float]:
    """The fraction of right counts for each part, pooled over the answers that have the part."""
    fractions = {}
    for name in sorted({name for grade in grades for name in grade.parts}):
        counts = [grade.parts[name] for grade in grades if name in grade.parts]
        fractions[name] = sum(right for right, _ in counts) / sum(of for _, of in counts)
    return fractions


def on_questions(result: Result, questions: Sequence[int]) -> Result:
    """The result with the accuracy on only these questions. The other fields are unchanged."""
    return result | _accuracy([result["scores"][i] for i in questions])


def on_axis(results: Sequence[Result], axis: str) -> list[Result]:
    """The results on the benchmarks of an axis."""
    return [result for result in results if result["axis"] == axis]


def axis_mean(results: Sequence[Result], axis: str) -> tuple[float, float] | None:
    """Mean accuracy over the benchmarks of an axis, and its standard error; None if the axis has no benchmark."""
    part = on_axis(results, axis)
    return mean_accuracy(part) if part else None


def mean_accuracy(results: Sequence[Result]) -> tuple[float, float]:
    """Mean accuracy over benchmarks, and its standard error."""
    mean = sum(result["accuracy"] for result in results) / len(results)
    return mean, math.sqrt(sum(result["standard_error"] ** 2 for result in results)) / len(results)
