"""The sections and panels of the page, and its figures over steps."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from camopd_jax.reporting import curves, plots
from camopd_jax.reporting.answers import AnswerPair
from camopd_jax.reporting.curves import Curve
from camopd_jax.reporting.plots import Line
from camopd_jax.reporting.results import columns
from camopd_jax.reporting.styles import STAGES, Styles
from camopd_jax.reporting.tables import PageTable


@dataclass(frozen=True)
class Panel:
    """A figure with its title and an explanation."""

    title: str
    plot: go.Figure
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page; a section without content is left out."""

    title: str
    about: str = ""
    tables: Sequence[PageTable] = ()
    panels: Sequence[Panel] = ()
    answers: Sequence[AnswerPair] = ()


@dataclass(frozen=True)
class Metric:
    """A value in metrics.jsonl, to be drawn for each branch or phase."""

    key: str
    title: str
    unit: str
    percent: bool = False
    from_zero: bool = True
    bins: int = curves.BINS


SELECTION = (
    Metric("selected_fraction", "Share of answers selected", "of all answers", percent=True),
    Metric("selected_mass", "Gap mass of the selected answers", "of all gap mass", percent=True, from_zero=False),
    Metric("selected_length_mean", "Length of the selected answers", "tokens"),
)
GAPS = (
    Metric("gap_mean", "Gap: log teacher - log student", "nats per token", from_zero=False),
    Metric("gap_abs_mean", "Absolute gap", "nats per token"),
    Metric("gap_mass_median", "Gap mass of the answers: median", "nats per token"),
    Metric("gap_mass_top", "Gap mass of the answers: 90th percentile", "nats per token"),
)
ANSWERS = (
    Metric("length_mean", "Length of the answers", "tokens"),
    Metric("truncated_fraction", "Answers cut at the maximum length", "of all answers", True, bins=curves.RATE_BINS),
    Metric("entropy", "Entropy of the student", "nats per token"),
    Metric("repetition", "Repetition in the answers", "of all 4-grams of tokens", True, bins=curves.RATE_BINS),
)
AGREEMENT = (
    Metric("overlap_ratio", "Likeliest tokens that student and teacher share", "of the top k", percent=True),
    Metric("overlap_advantage", "Advantage on the shared tokens", "nats", from_zero=False),
    Metric("entropy_gap", "Difference of the entropies of teacher and student", "nats per token"),
)
OPTIMISATION = (
    Metric("loss", "Loss", "nats", from_zero=False),
    Metric("grad_norm", "Gradient norm before clipping", "norm"),
    Metric("grad_clipped", "Share of gradients clipped", "of all steps", True, bins=curves.RATE_BINS),
)
SPEED = (Metric("tokens_per_second", "Answer tokens per second", "tokens per second"),)


def over_steps(styles: Styles) -> list[Panel]:
    """Panels of recovery and retention during training, for each benchmark and the mean of each axis."""
    panels = []
    for measure, name in columns(styles.groups):
        unit, start = ("of the lost ability", 0) if measure == "recovery" else ("of the domain ability", 1)
        if drawn := _lines(styles, curves.standing_curve, measure, name):
            title = f"{measure.capitalize()}: {'mean over benchmarks' if name == 'mean' else name}"
            plot = plots.lines(drawn, unit, percent=True, reference=start)
            panels.append(Panel(title, plot.update_layout(showlegend=len(styles.groups) > 1)))
    return panels


def metric_panels(metrics: Sequence[Metric], styles: Styles) -> list[Panel]:
    """Panels of metrics: for several groups, one per branch or phase; for one group, one with a line for each."""
    panels = []
    for metric in metrics:
        options = metric.unit, metric.percent, metric.from_zero
        alone = []
        for part, colour in styles.parts.items():
            drawn = _lines(styles, curves.average_curve, lambda run, p=part: run.rows_of(p), [metric.key], metric.bins)
            if len(styles.groups) > 1 and drawn:
                panels.append(Panel(f"{metric.title}, {part}", plots.lines(drawn, *options)))
            alone += [Line(part, colour, line.curve) for line in drawn]
        if len(styles.groups) == 1 and alone:
            panels.append(Panel(metric.title, plots.lines(alone, *options)))
    return panels


def _lines(styles: Styles, curve: Callable[..., Curve], *arguments: Any) -> list[Line]:
    """A line for each group with points in `curve(runs, *arguments)`."""
    of_groups = [(group.name, curve(group.distinct, *arguments)) for group in styles.groups]
    return [Line(name, styles.colours[name], line) for name, line in of_groups if line.steps]


def step_times(styles: Styles) -> list[Panel]:
    """A panel of the seconds of a step by stage, for the branches or phases of the lead groups."""
    rows = {}
    for group, part in itertools.product(styles.leads, styles.parts):
        of_part = [row for run in group.distinct for row in run.rows_of(part)]
        seconds = {stage: [value for _, value in curves.points(of_part, ["seconds", stage])] for stage in STAGES}
        if any(seconds.values()):
            name = f"{group.name}: {part}" if len(styles.groups) > 1 else part
            rows[name] = {stage: float(np.median(of_stage or [0])) for stage, of_stage in seconds.items()}
    note = "Medians over steps, which exclude nearly all compilation."
    return [Panel("Time of a step by stage", plots.stages(rows), note)] if rows else []
