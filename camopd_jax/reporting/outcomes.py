"""What every group got back and kept, and how far it is from the methods it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from camopd_jax.analysis import study
from camopd_jax.config.methods import AGAINST
from camopd_jax.evals.comparison import comparison, kept_share, recovered_share
from camopd_jax.evals.results import Result, on_axis, on_questions
from camopd_jax.reporting.runs import Final, Group, final

Column = tuple[str, str]  # "recovery" or "retention"; benchmark or "mean"


@dataclass(frozen=True)
class Outcome:
    """A group's results. Those of a grid leave out the questions that chose its settings."""

    group: Group
    finals: dict[int, Final]  # by seed

    def shares(self, column: Column) -> dict[int, tuple[float, float]]:
        """By seed, a share and its standard error over questions."""
        measure, name = column
        found = {seed: comparison(*last.models)[measure].get(name) for seed, last in self.finals.items()}
        return {seed: (share[0], share[1]) for seed, share in found.items() if share is not None}

    @property
    def single(self) -> Final | None:
        """The scores, where there is only one model: the interpolation is the same whatever the seed."""
        found = {id(last): last for last in self.finals.values()}
        return next(iter(found.values())) if len(found) == 1 else None


@dataclass(frozen=True)
class Estimate:
    """`error`: one standard error, over seeds, or over questions of a single model."""

    value: float
    error: float
    over: str


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % confidence interval."""

    value: float
    low: float
    high: float
    n: int
    over: str

    @property
    def sure(self) -> bool:
        """Whether zero is outside. Two seeds that differ by the very same amount say nothing of the spread."""
        return self.low < self.high and (self.low > 0 or self.high < 0)


def outcome(group: Group) -> Outcome | None:
    """None where no model of the group has been evaluated beside its teachers."""
    found: dict[int, Final] = {}
    known: dict[int, Final | None] = {}
    for seed, run in group.runs.items():
        if id(run) not in known:
            last = final(run)
            known[id(run)] = last.without_tuning() if last and group.origin else last
        if last := known[id(run)]:
            found[seed] = last
    return Outcome(group, found) if found else None


def columns(outcomes: Sequence[Outcome]) -> list[Column]:
    """The benchmarks of both axes, each axis followed by its mean if it has several."""
    rows = {row["benchmark"]: row for of in outcomes for last in of.finals.values() for row in last.student}
    found = []
    for measure, axis in (("recovery", "general"), ("retention", "domain")):
        names = [row["benchmark"] for row in on_axis(list(rows.values()), axis)]
        found += [(measure, name) for name in (*names, *(["mean"] if len(names) > 1 else []))]
    return found


def estimate(of: Outcome, column: Column) -> Estimate | None:
    found = of.shares(column)
    if not found:
        return None
    if of.single:
        value, error = next(iter(found.values()))
        return Estimate(value, error, "questions")
    mean = study.mean(value for value, _ in found.values())
    return Estimate(mean.value, mean.error or 0.0, "seeds")


def reference(outcomes: Sequence[Outcome], of: Outcome, method: str) -> Outcome | None:
    """The group that another's difference is taken from: the first of the method, of the same grid or beside it."""
    return next((o for o in outcomes if o.group.method == method and o.group.origin == of.group.origin), None)


def references(outcomes: Sequence[Outcome]) -> list[str]:
    """The methods that others can be compared with here."""
    return [method for method in AGAINST
            if any((theirs := reference(outcomes, of, method)) and theirs is not of for of in outcomes)]  # fmt: skip


def difference(ours: Outcome, theirs: Outcome, column: Column) -> Interval | None:
    """`ours - theirs`: paired over the seeds that both have, or over questions between two single models."""
    if ours.single and theirs.single:
        return _over_questions(ours.single, theirs.single, column)
    a, b = ({seed: value for seed, (value, _) in of.shares(column).items()} for of in (ours, theirs))
    found, n = study.difference(a, b), len(a.keys() & b.keys())
    return None if found is None else _interval(found.value, found.error, n, "seeds")


def _over_questions(ours: Final, theirs: Final, column: Column) -> Interval | None:
    """None where the two were asked different questions.

    The difference of two shares is the share of one student whose scores are the difference: of what `recovered_share`
    takes the specialised model from, and of what `kept_share` divides by it.
    """
    measure, name = column
    kept = [i for i, row in enumerate(ours.student) if name in ("mean", row["benchmark"])]
    pairs = [(ours.student[i], theirs.student[i]) for i in kept if i < len(theirs.student)]
    if len(pairs) < len(kept) or any((a["asked"], a["n"]) != (b["asked"], b["n"]) for a, b in pairs):
        return None
    axis = {"recovery": "general", "retention": "domain"}[measure]
    general, specialised = ([rows[i] for i in kept if rows[i]["axis"] == axis]
                            for rows in (ours.general, ours.specialised))  # fmt: skip
    pairs = [pair for pair in pairs if pair[0]["axis"] == axis]
    if measure == "recovery":
        apart = [_summed(p, a, b) for p, (a, b) in zip(specialised, pairs, strict=True)]
        share = recovered_share(general, specialised, apart)
    else:
        share = kept_share(specialised, [_summed(None, a, b) for a, b in pairs])
    n = min((row["n"] for row, _ in pairs), default=0)
    return None if share is None or n < 2 else _interval(share.value, share.error, n, "questions")


def _summed(base: Result | None, plus: Result, minus: Result) -> Result:
    """A result whose questions score `base + plus - minus`."""
    before = base["scores"] if base else [0.0] * plus["n"]
    scores = [x + a - b for x, a, b in zip(before, plus["scores"], minus["scores"], strict=True)]
    return on_questions(plus | {"scores": scores}, range(plus["n"]))


def _interval(value: float, error: float, n: int, over: str) -> Interval:
    half = study.half_width(error, n)
    return Interval(value, value - half, value + half, n, over)
