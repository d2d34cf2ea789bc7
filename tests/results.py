"""Makes results of benchmarks from the grades of questions."""

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals.results import summarise
from camopd_jax.evals.task import Grade


def scored(values, name="sums", axis="general"):
    """A result with these grades, one per question."""
    grades = [[Grade(float(value))] for value in values]
    return summarise(Benchmark(name, axis=axis), grades, [1] * len(grades), [True] * len(grades))
