"""The page's sections of figures over the steps of runs. A section without data is empty and left out."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial

from camopd_jax.evals.results import on_axis
from camopd_jax.method.loop import BRANCHES
from camopd_jax.reporting import plots, series, svg
from camopd_jax.reporting.blocks import Figure, Legend, Section
from camopd_jax.reporting.cast import Cast, Style
from camopd_jax.reporting.outcomes import Column
from camopd_jax.reporting.plots import Line
from camopd_jax.reporting.runs import Run
from camopd_jax.reporting.series import Curve, Points
from camopd_jax.reporting.svg import SMALL, SMALLEST, STAGES

BRANCH_LEGEND: Legend = [(name, name) for name in BRANCHES]
MEASURES = {"recovery": "Recovery", "retention": "Retention"}
RATES = ("truncated_fraction", "repetition", "grad_clipped")
LONE = {"mixed": "ink"}  # colours of phases that are no branch's


def over_steps(cast: Cast) -> Section:
    """Recovery and retention between the steps, by benchmark and as the axes' means."""
    figures = []
    for measure, name in _columns_of_standings(cast):
        drawn = _group_lines(cast, lambda runs, key=(measure, name): series.standing_over(runs, *key))
        title = f"{MEASURES[measure]}: {'mean of its benchmarks' if name == 'mean' else name}"
        zero_or_one = 0 if measure == "recovery" else 1
        figures.append(_figure(title, plots.lines(drawn, "of what was lost" if measure == "recovery" else "of what was",
                                                  share=True, reference=zero_or_one)))  # fmt: skip
    bands = "Bands: ± one standard error, over seeds or, of a run alone, over questions. "
    dashed = "Dashed: where the specialised model is, which the student starts as."
    multiples = _one_by_one(cast) if cast.many else []
    if multiples:
        dashed += " Small: recovery of each of the grey ones, in the colour of the text, beside those in colour."
    found = _over_groups("Recovery and retention over steps", bands + dashed, cast, figures)
    return dataclasses.replace(found, multiples=multiples)


def _columns_of_standings(cast: Cast) -> list[Column]:
    names: dict[Column, None] = {}
    for group in cast.groups:
        for run in group.distinct:
            for row in series.standings(run)[-1:]:
                for measure, axis in (("recovery", "general"), ("retention", "domain")):
                    shares = row.get(measure, {})
                    asked = [b["name"] for b in on_axis(run.config["evaluation"]["benchmarks"], axis)]
                    order = [name for name in ("mean", *asked) if name in shares]
                    names |= dict.fromkeys((measure, name) for name in (order if len(order) > 2 else order[-1:]))
    return sorted(names, key=lambda column: list(MEASURES).index(column[0]))


def _one_by_one(cast: Cast) -> list[Figure]:
    """Of each grey group, a small figure of its own, in the colour of the text, beside those in colour."""
    found = []
    for group in cast.groups:
        if cast.style(group).muted:
            shown = [*(g for g in cast.groups if not cast.style(g).muted), group]
            drawn = [Line(g.name, Style("ink") if g is group else cast.style(g), curve) for g in shown
                     if (curve := series.standing_over(g.distinct, "recovery", "mean"))]  # fmt: skip
            if drawn and drawn[-1].name == group.name:
                paint, title = plots.lines(drawn, "recovery, mean", share=True, reference=0), group.name
                found.append(Figure(title, svg.draw(paint, f"Recovery of {title}", SMALLEST, left=44)))
    return found


def selection(cast: Cast) -> Section:
    figures = [
        *_by_branch(cast, "selected_fraction", "Answers that were selected", "of the answers", share=True, floor=0),
        *_by_branch(cast, "selected_mass", "Gap mass that they hold", "of the score", share=True),
        *_by_branch(cast, "selected_length_mean", "Length of the selected answers", "tokens", floor=0),
    ]
    return _over_groups("Selection", "Which answers are trained on.", cast, figures)


def gaps(cast: Cast) -> Section:
    """Gaps over the steps, and the answers' scores in the early, middle and late third of a run."""
    figures = [
        *_by_branch(cast, "gap_mean", "Gap, log teacher less log student", "nats per token"),
        *_by_branch(cast, "gap_abs_mean", "Size of the gap", "nats per token", floor=0),
    ]
    for group in cast.leads:
        for branch in BRANCHES:
            rows = [row for run in group.distinct for row in run.selection if row["phase"] == branch]
            thirds = _thirds([(row["step"], row["score"]) for row in rows])
            if any(thirds):
                title = f"Scores of the answers, {branch}" + (f": {group.name}" if len(cast.groups) > 1 else "")
                figures.append(_figure(title, plots.histograms(thirds, branch), branch, _third_note(rows)))
    return _over_groups(
        "Gaps", "The signal: how much likelier the teacher holds the student's own tokens.", cast, figures
    )


def _thirds(scores: Sequence[tuple[int, list[float]]]) -> list[list[float]]:
    found: list[list[float]] = [[], [], []]
    last = max((step for step, _ in scores), default=0) + 1
    for step, values in scores:
        found[3 * step // last] += [value for value in values if value is not None]
    return found


def _third_note(rows: Sequence[dict]) -> str:
    last = max(row["step"] for row in rows) + 1
    ends = [-(-last * i // 3) for i in range(4)]
    thirds = ", ".join(f"{a} to {b - 1}" for a, b in itertools.pairwise(ends) if a < b)
    return f"Pale to full: steps {thirds}. Scores under {plots.LOWEST:g} are counted at the left edge."


def answers(cast: Cast) -> Section:
    figures = [
        *_by_branch(cast, "length_mean", "Length of the answers", "tokens", floor=0),
        *_by_branch(cast, "truncated_fraction", "Answers cut at the longest length", "of the answers", True, floor=0),
        *_by_branch(cast, "entropy", "Entropy of the student", "nats per token", floor=0),
        *_by_phase(cast, "repetition", "Repetition in the answers", "of its runs of 4 tokens", True, floor=0),
    ]
    return _over_groups("Answers", "What the student says, before anything is selected.", cast, figures)


def optimisation(cast: Cast) -> Section:
    figures = [
        *_by_phase(cast, "loss", "Loss", "nats"),
        *_by_phase(cast, "grad_norm", "Gradient before clipping", "its norm", floor=0),
        *_by_phase(cast, "grad_clipped", "Gradients that were clipped", "of the steps", True, floor=0),
    ]
    return _over_groups("Optimisation", "", cast, figures)


def throughput(cast: Cast) -> Section:
    """Seconds by stage: of every group, or of a lone one's phases; and tokens per second."""
    if len(cast.groups) == 1:
        runs = cast.groups[0].distinct
        rows = [(phase, _seconds(runs, [phase])) for phase in series.phases(runs)]
    else:
        rows = [(group.name, _seconds(group.distinct, series.phases(group.distinct))) for group in cast.groups[:12]]
    rows = [(name, seconds) for name, seconds in rows if sum(seconds.values()) > 0]
    figures = []
    if rows:
        size = (SMALL[0], max(SMALL[1] - 60, 60 + 26 * len(rows)))
        legend = [(name, f"stage-{name}") for name in STAGES]
        note = "Medians over steps: compiling hardly counts." + (
            f" The first {len(rows)} of {len(cast.groups)}." if len(rows) < len(cast.groups) > 12 else ""
        )
        drawing = svg.draw(plots.stages(rows), "Seconds of a step by stage", size, left=128)
        figures.append(Figure("Time of a step, by stage", drawing, note=note, legend=legend))
    figures += _by_phase(cast, "tokens_per_second", "Answer tokens per second", "tokens per second", floor=0)
    return _over_groups("Throughput", "", cast, figures)


def _seconds(runs: Sequence[Run], phases: Sequence[str]) -> dict[str, float]:
    """Of a typical step: each phase's median, weighed by how often the phase came."""
    total: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    steps = sum(row["phase"] in phases for run in runs for row in run.metrics)
    for phase in phases:
        for stage in STAGES:
            found = sorted(v for run in runs for _, v in series.phase_points(run, phase, f"seconds.{stage}"))
            if found:
                share = sum(row["phase"] == phase for run in runs for row in run.metrics) / steps
                total[stage] += share * found[len(found) // 2]
    return total


# ------------------------------------------------------------------------------ common to them


def _over_groups(title: str, about: str, cast: Cast, figures: list[Figure]) -> Section:
    legend = cast.legend if len(cast.groups) > 1 else []
    return Section(title, about, legend, figures)


def _group_lines(cast: Cast, curve: Callable[[Sequence[Run]], Curve]) -> list[Line]:
    return [Line(group.name, cast.style(group), found) for group in cast.groups if (found := curve(group.distinct))]


def _by_branch(
    cast: Cast, key: str, title: str, unit: str, share: bool = False, floor: float | None = None
) -> list[Figure]:
    return _apart(cast, BRANCHES, series.branch_points, key, title, unit, share, floor)


def _by_phase(
    cast: Cast, key: str, title: str, unit: str, share: bool = False, floor: float | None = None
) -> list[Figure]:
    names = series.phases(run for group in cast.groups for run in group.distinct)
    return _apart(cast, names, series.phase_points, key, title, unit, share, floor)


def _apart(
    cast: Cast,
    parts: Sequence[str],
    points: Callable[[Run, str, str], Points],
    key: str,
    title: str,
    unit: str,
    share: bool,
    floor: float | None,
) -> list[Figure]:
    """A figure for each branch or phase with a line for each group; of a lone group, one with a line for each part."""
    bins = series.RATE_BINS if key in RATES else series.BINS
    drawn = {
        part: _group_lines(
            cast, partial(series.curve_of, points=lambda run, part=part: points(run, part, key), at_most=bins)
        )
        for part in parts
    }
    drawn = {part: found for part, found in drawn.items() if found}
    if len(cast.groups) == 1:
        alone = [Line(part, Style(_colour(part)), found[0].curve) for part, found in drawn.items()]
        legend = [(part, _colour(part)) for part in drawn]
        return [_figure(title, plots.lines(alone, unit, share, floor), legend=legend)] if alone else []
    return [_figure(f"{title}, {part}", plots.lines(found, unit, share, floor), part if part in BRANCHES else "")
            for part, found in drawn.items()]  # fmt: skip


def _colour(part: str) -> str:
    return part if part in BRANCHES else LONE.get(part, "ink")


def _figure(title: str, paint: plots.Paint, mark: str = "", note: str = "", legend: Legend = ()) -> Figure:
    return Figure(title, svg.draw(paint, title), mark, note, list(legend))
