"""Differences between groups and the methods that they are compared with."""

from collections.abc import Sequence

from camopd_jax.analysis import study
from camopd_jax.analysis.study import Mean
from camopd_jax.evals.comparison import kept_share, recovered_share
from camopd_jax.evals.results import Result, on_questions
from camopd_jax.reporting.runs import Column, Group, ModelResults

AXES = {"recovery": "general", "retention": "domain"}  # the axis of the benchmarks for each measure


def columns(groups: Sequence[Group]) -> list[Column]:
    """The benchmarks of both axes; an axis with several benchmarks also has "mean"."""
    benchmarks = [benchmark for group in groups for benchmark in group.run.config["evaluation"]["benchmarks"]]
    pairs: list[Column] = []
    for measure, axis in AXES.items():
        names = dict.fromkeys(benchmark["name"] for benchmark in benchmarks if benchmark["axis"] == axis)
        pairs += [(measure, name) for name in (*names, *(["mean"] if len(names) > 1 else []))]
    return pairs


def reference(groups: Sequence[Group], group: Group, method: str) -> Group | None:
    """The group to compare with: the first one of the method in the same grid or among single runs, if not itself."""
    first = next((other for other in groups if (other.method, other.grid) == (method, group.grid)), None)
    return None if first is group else first


def difference(group: Group, other: Group, column: Column) -> Mean | None:
    """`group - other`: paired by the seeds that both have, or by question if both have a single model."""
    if group.single and other.single:
        return _over_questions(group.single, other.single, column)
    a, b = ({seed: value for seed, (value, _) in of.values(column).items()} for of in (group, other))
    apart = study.difference(a, b)
    return None if apart is None else Mean(apart.value, apart.error, len(a.keys() & b.keys()))


def _over_questions(models: ModelResults, other: ModelResults, column: Column) -> Mean | None:
    """The difference between two students with its error over questions; None if they answered different questions.

    Recovery and retention are linear in the student's grades. So the difference is the recovery of a student with the
    grade `specialised + student - other` for each question, and the retention of one with `student - other`.
    """
    measure, name = column
    general, specialised, a, b = (
        [row for row in rows if row["axis"] == AXES[measure] and name in ("mean", row["benchmark"])]
        for rows in (*models, other[-1])
    )
    if [(row["asked"], row["n"]) for row in a] != [(row["asked"], row["n"]) for row in b]:
        return None
    if measure == "recovery":
        share = recovered_share(general, specialised, list(map(_combined, specialised, a, b)))
    else:
        share = kept_share(specialised, list(map(_combined, [None] * len(a), a, b)))
    n = min((row["n"] for row in a), default=0)
    return None if share is None or n < 2 else Mean(share.value, share.error, n)


def _combined(base: Result | None, plus: Result, minus: Result) -> Result:
    """A result with the grades `base + plus - minus`; base None: 0."""
    start = base["scores"] if base else [0.0] * plus["n"]
    combined = [x + a - b for x, a, b in zip(start, plus["scores"], minus["scores"], strict=True)]
    return on_questions(plus | {"scores": combined}, range(plus["n"]))
