"""Plotly figures: lines over steps, stacked bars, heat maps, recovery against retention."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from camopd_jax.reporting.curves import Curve
from camopd_jax.reporting.runs import Column, Group
from camopd_jax.reporting.styles import DIVERGING, MUTED, STAGES

FEW = 12  # maximum number of points of a line with markers
HEIGHT, ROW = 270, 22  # height in pixels of a figure, and of one row in a figure with rows
PERCENT = {"tickformat": ".3~%", "hoverformat": ".1%"}
NUMBER = {"hoverformat": ".4~g"}
REFERENCE = {"line": {"color": MUTED, "width": 1, "dash": "dash"}, "layer": "below"}


@dataclass(frozen=True)
class Line:
    """A curve with its style. Lines in MUTED are below the others. They and dashed lines are not in the legend."""

    name: str
    colour: str
    curve: Curve
    dash: str = "solid"


def lines(
    drawn: Sequence[Line], unit: str, percent: bool = False, from_zero: bool = False, reference: float | None = None
) -> go.Figure:
    """Lines over steps, each with a band of ± one standard error if its points have errors.

    Args:
      unit: of the values. percent: show them in %. from_zero: the axis includes zero.
      reference: the value of a horizontal dashed line.
    """
    traces = []
    for line in sorted(drawn, key=lambda line: line.colour != MUTED):
        x, y, muted = line.curve.steps, line.curve.values, line.colour == MUTED
        stroke = {"color": line.colour, "width": 1 if muted else 2, "dash": line.dash}
        mode = "lines+markers" if len(x) <= FEW and not muted else "lines"
        traces += [] if muted else [_band(line)]
        traces.append(
            go.Scatter(x=x, y=y, line=stroke, mode=mode, **_names(line.name, line.colour, line.dash == "solid"))
        )
    axis = {"rangemode": "tozero" if from_zero else "normal", **(PERCENT if percent else NUMBER)}
    plot = _figure(traces, "step", unit).update_yaxes(axis).update_xaxes(showgrid=False, hoverformat=".0f")
    return plot if reference is None else plot.add_hline(reference, **REFERENCE)


def _band(line: Line) -> go.Scatter:
    """The area within one standard error of a line, if its points have errors."""
    curve = line.curve
    points = [(x, y, e) for x, y, e in zip(curve.steps, curve.values, curve.errors, strict=True) if e is not None]
    outline = [(x, y + e) for x, y, e in points] + [(x, y - e) for x, y, e in points[::-1]]
    area = {"fill": "toself", "fillcolor": line.colour, "opacity": 0.18, "line": {"width": 0}, "mode": "lines"}
    names = _names(line.name, line.colour, in_legend=False)
    return go.Scatter(x=[x for x, _ in outline], y=[y for _, y in outline], hoverinfo="skip", **area, **names)


def stages(rows: dict[str, dict[str, float]]) -> go.Figure:
    """A stacked bar for each row: seconds of a step by stage."""
    names = [html.escape(f"{name}, {sum(seconds.values()):.3g} s") for name, seconds in rows.items()]
    traces = [
        go.Bar(x=[row[stage] for row in rows.values()], y=names, name=stage, orientation="h", marker={"color": colour})
        for stage, colour in STAGES.items()
    ]
    plot = _figure(traces, "seconds of a step", "", len(rows), barmode="stack", legend={"traceorder": "normal"})
    return plot.update_xaxes(hoverformat=".3~g")


def heat_map(steps: Sequence[float], names: Sequence[str], values: Sequence[Sequence[float | None]]) -> go.Figure:
    """A cell for each name and step, coloured by sign and size of its value. Values: [names, steps]."""
    look = {"zmid": 0, "colorscale": DIVERGING, "xgap": 1, "ygap": 1, "colorbar": {"thickness": 10}}
    trace = go.Heatmap(x=[f"{step:g}" for step in steps], y=names, z=values, hoverongaps=False, **look)
    return _figure([trace], "step", "", len(names)).update_xaxes(type="category", nticks=8, showgrid=False)


def pareto(
    groups: Sequence[Group], interpolation: Sequence[Group], columns: Sequence[Column], colours: dict[str, str]
) -> go.Figure:
    """Recovery against retention with error bars of one standard error, and the interpolations of the two models.

    Args:
      columns: of recovery and of retention. colours: of the groups by name.
    """
    hollow = {"color": MUTED, "size": 10, "symbol": "circle-open"}
    traces = [go.Scatter(x=[0], y=[1], name="the specialised model", mode="markers", marker=hollow)]
    recovery, retention = columns
    between = [(group.name, group.estimate(recovery), group.estimate(retention)) for group in interpolation]
    if path := [(name, x.value, y.value) for name, x, y in between if x and y]:
        weights, xs, ys = zip(*path, strict=True)
        look = {"mode": "lines+markers", "line": {"color": MUTED, "width": 1}, "marker": {"symbol": "square"}}
        traces.append(go.Scatter(x=xs, y=ys, name="interpolation of the two models", hovertext=weights, **look))
    for group in groups:
        x, y = group.estimate(recovery), group.estimate(retention)
        if x and y:
            colour = colours[group.name]
            marker = {"color": colour, "size": 7 if colour == MUTED else 11}
            errors = {"error_x": {"array": [x.error or 0]}, "error_y": {"array": [y.error or 0]}}
            names = _names(group.name, colour)
            traces.append(go.Scatter(x=[x.value], y=[y.value], mode="markers", marker=marker, **errors, **names))
    titles = "recovery: how much of the lost general ability is back", "retention: how much of the domain is kept"
    plot = _figure(traces, *titles, height=440).update_xaxes(PERCENT).update_yaxes(PERCENT)
    return plot.add_hline(1, **REFERENCE)


def _names(name: str, colour: str, in_legend: bool = True) -> dict[str, Any]:
    """Name and legend of a trace, escaped for Plotly. A legend entry controls all traces of the same colour."""
    return {"name": html.escape(name), "legendgroup": colour, "showlegend": in_legend and colour != MUTED}


def _figure(traces: Sequence[Any], x: str, y: str, rows: int = 0, **layout: Any) -> go.Figure:
    """A figure; the page sets its template. `rows`: number of names along the vertical axis, the first one on top."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    plot = go.Figure(traces, {"template": {}, "height": max(HEIGHT, 90 + ROW * rows), **axes, **layout})
    return plot.update_yaxes(autorange="reversed", showgrid=False) if rows else plot
