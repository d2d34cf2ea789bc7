"""The sections on gradients, from diagnostics.jsonl: do the answers of a batch agree, and do the branches."""

import numpy as np

from camopd_jax.method.loop import BRANCHES
from camopd_jax.reporting import plots, series, svg
from camopd_jax.reporting.blocks import Figure, Legend, Section
from camopd_jax.reporting.cast import Cast, Style
from camopd_jax.reporting.plots import Line
from camopd_jax.reporting.runs import Group
from camopd_jax.reporting.svg import SMALL

DASHES = {"selected": "-", "all": "--", "random": ":"}
ABOUT = (
    "Coherence: length of the sum of the answers' gradients over the sum of their lengths; 1 where all pull one way. "
    "Small sets cohere by being small, so the selected answers' gain in coherence is told over all answers (GCG) and "
    "over as many drawn by lot. Signal: length of the mean gradient, which an update follows. Conflict: the cosine "
    "between the recovery's and the review's gradient; below 0 they oppose each other."
)
CONFLICT = (("cosine", "Conflict of the branches", "cosine"),
            ("survives", "What survives of both gradients in their sum", "|g + d| / (|g| + |d|)"))  # fmt: skip
COLUMNS = 20  # of a heat map
MEASURED = {"length": "length", "truncated": "cut at the end", "entropy": "entropy", "student_loss": "student's loss",
            "teacher_loss": "teacher's loss"}  # fmt: skip


def section(cast: Cast) -> Section:
    """Coherence, gain and conflict, of each lead group that measured them."""
    groups = [group for group in cast.leads if any(run.diagnostics for run in group.distinct)]
    figures = [figure for group in groups for figure in _of_group(group, len(cast.groups) > 1)]
    legend: Legend = [(name, name) for name in BRANCHES]
    return Section("Gradients", ABOUT, legend, figures)


def _of_group(group: Group, one_of_several: bool) -> list[Figure]:
    named = f": {group.name}" if one_of_several else ""
    figures = []
    for branch in BRANCHES:
        drawn = [_line(group, name, branch, dashes, "branches", branch, "coherence", name)
                 for name, dashes in DASHES.items()]  # fmt: skip
        figures += _lines(f"Coherence, {branch}{named}", drawn, "coherence", branch, _sets(drawn), share=True)
        drawn = [_line(group, name, branch, dashes, "branches", branch, "signal", name)
                 for name, dashes in DASHES.items()]  # fmt: skip
        figures += _lines(f"Signal, {branch}{named}", drawn, "|mean gradient|", branch, _sets(drawn))
        drawn = [_line(group, over, branch, DASHES[over], "branches", branch, key)
                 for over, key in (("all", "gcg"), ("random", "gcg_random"))]  # fmt: skip
        title = f"Gain in coherence by selection, {branch}{named}"
        figures += _lines(title, drawn, "over other sets", branch, _sets(drawn), share=True, reference=0)
    for key, title, unit in CONFLICT:
        drawn = [_line(group, name, "ink", DASHES[name], "conflict", name, key) for name in ("selected", "all")]
        reference = 0 if key == "cosine" else None
        figures += _lines(f"{title}{named}", drawn, unit, note=_sets(drawn), reference=reference)
    return figures + _layers(group, named) + _correlations(group, named)


def _line(group: Group, name: str, colour: str, dashes: str, *path: str) -> Line:
    curve = series.curve_of(group.distinct, lambda run: series.diagnostic_points(run, *path))
    return Line(name, Style(colour), curve, dashes)


def _sets(drawn: list[Line]) -> str:
    words = {"selected": "solid: selected answers", "all": "dashed: all", "random": "dotted: as many drawn by lot"}
    return "; ".join(words[line.name] for line in drawn if line.curve).capitalize()


def _lines(title: str, drawn: list[Line], unit: str, mark: str = "", note: str = "", **options) -> list[Figure]:
    drawn = [line for line in drawn if line.curve]
    return [Figure(title, svg.draw(plots.lines(drawn, unit, **options), title), mark, note)] if drawn else []


def _layers(group: Group, named: str) -> list[Figure]:
    """Cosine of the two branches' gradients, layer by layer."""
    rows = [row for run in group.distinct for row in run.diagnostics if row.get("layers")]
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return []
    width = -(-len(steps) // COLUMNS)
    columns = [steps[i : i + width] for i in range(0, len(steps), width)]
    values = np.asarray([[_mean(row["layers"].get(name) for row in rows if row["step"] in column) for column in columns]
                         for name in names])  # fmt: skip
    if not np.isfinite(values).any():
        return []
    largest = float(np.nanmax(np.abs(values)))
    limit = next((limit for limit in (0.05, 0.1, 0.2, 0.5) if largest <= limit), 1.0)
    size = (SMALL[0], max(SMALL[1], 62 + 15 * min(len(names), 14)))
    paint = plots.heat([sum(column) / len(column) for column in columns], names, values, limit)
    title = f"Conflict, layer by layer{named}"
    legend = [(svg.minus(f"-{limit:g}, opposed"), "level-0"), ("0", "level-4"), (f"+{limit:g}, aligned", "level-8")]
    drawing = svg.draw(paint, title, size, left=84)
    return [Figure(title, drawing, note="Cosine of the branches' gradients", legend=legend)]


def _mean(values) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else float("nan")


def _correlations(group: Group, named: str) -> list[Figure]:
    """What the answers' scores go with, at the last step that measured it."""
    found = [row for row in group.run.diagnostics if row.get("correlations")]
    if not found:
        return []
    rows = [(title, branch, tuple(value)) for branch in BRANCHES for key, title in MEASURED.items()
            if (value := (found[-1]["correlations"].get(branch) or {}).get(key)) and None not in value]  # fmt: skip
    if not rows:
        return []
    title = f"What the scores go with{named}"
    drawing = svg.draw(plots.intervals(rows, "rank correlation with the score"), title, left=112)
    return [Figure(title, drawing, note=f"At step {found[-1]['step']}, with intervals as measured")]
