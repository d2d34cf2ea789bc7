"""What is painted on a figure's axes: lines with bands, histograms, stacked bars, heat maps, intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from camopd_jax.reporting import svg
from camopd_jax.reporting.cast import Style
from camopd_jax.reporting.series import Curve
from camopd_jax.reporting.svg import LEVELS, STAGES, colour

Paint = Callable[[Axes], None]
LOWEST = 1e-3  # nats per token: of a score that a histogram tells from zero
FEW = 12  # points of a line that are marked each


@dataclass(frozen=True)
class Line:
    name: str
    style: Style
    curve: Curve
    dashes: str = "-"


def lines(
    drawn: Sequence[Line], unit: str, share: bool = False, floor: float | None = None, reference: float | None = None
) -> Paint:
    """Lines over steps, each with a band of one standard error on either side where its points have errors.

    Args:
      unit: of the values. share: whether they are shown in per cent.
      floor: the vertical axis begins there. reference: where a dashed line is drawn across.
    """

    def paint(axes: Axes) -> None:
        if reference is not None:
            axes.axhline(reference, color=colour("soft"), lw=0.9, ls=(0, (4, 3)))
        for order, line in enumerate(sorted(drawn, key=lambda line: not line.style.muted)):
            curve, style, on_top = line.curve, line.style, 2 + order
            marker = "o" if len(curve.steps) <= FEW and not style.muted else ""
            (path,) = axes.plot(curve.steps, curve.values, line.dashes, color=colour(style.colour), lw=style.width,
                                alpha=style.alpha, marker=marker, ms=4, zorder=on_top)  # fmt: skip
            svg.named(path, line.name)
            if not style.muted and any(error is not None for error in curve.errors):
                steps, low, high = zip(*((x, y - e, y + e) for x, y, e in zip(
                    curve.steps, curve.values, curve.errors, strict=True) if e is not None), strict=True)  # fmt: skip
                axes.fill_between(steps, low, high, color=colour(style.colour), alpha=0.16, lw=0, zorder=on_top)
        _step_axes(axes, unit, share)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        if any(line.style.muted for line in drawn):
            _frame(axes, drawn, floor)
            _name_ends(axes, drawn)

    return paint


def _frame(axes: Axes, drawn: Sequence[Line], floor: float | None) -> None:
    """Limits by the lines in colour and by four fifths of all: one that is far out must not flatten the rest."""
    most = np.quantile([value for line in drawn for value in line.curve.values], (0.1, 0.9)).tolist()
    shown = most + [value for line in drawn if not line.style.muted for value in line.curve.values]
    low, high = min(shown), max(shown)
    if low < high:
        margin = 0.12 * (high - low)
        axes.set_ylim(low - margin if floor is None else floor, high + margin)


def _name_ends(axes: Axes, drawn: Sequence[Line]) -> None:
    """Names at the right ends of lines where there is room: first of those in colour, then of the outermost."""
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, box.width * 0.76, box.height))
    axes.set_ylim(axes.get_ylim())
    frame = axes.get_window_extent()
    ends = {line.name: axes.transData.transform((line.curve.steps[-1], line.curve.values[-1]))[1] for line in drawn}
    middle = sorted(ends.values())[len(ends) // 2]
    taken: list[float] = []
    for line in sorted(drawn, key=lambda line: (line.style.muted, -abs(ends[line.name] - middle))):
        height = min(max(ends[line.name], frame.y0), frame.y1)
        away = "\u2193 " if ends[line.name] < frame.y0 - 1 else "\u2191 " if ends[line.name] > frame.y1 + 1 else ""
        if all(abs(height - other) >= 11 for other in taken):
            taken.append(height)
            place = (1.02, axes.transAxes.inverted().transform((0, height))[1])
            axes.text(*place, away + _cut(line.name, 12), transform=axes.transAxes, va="center", fontsize=10,
                      color=colour("soft" if line.style.muted else line.style.colour))  # fmt: skip


def _step_axes(axes: Axes, unit: str, share: bool) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.margins(x=0.02, y=0.08)
    svg.steps(axes.xaxis)
    (svg.percent if share else svg.plain)(axes.yaxis)


def histograms(values: Sequence[Sequence[float]], of: str, lowest: float = LOWEST) -> Paint:
    """Outlines of the shares of answers by score, on a logarithmic axis: from early, pale, to late, full.

    Args:
      values: early, middle and late. of: the colour's name. lowest: what is less is counted there.
    """
    highest = max(10 * lowest, *(max(part) for part in values if len(part)))
    edges = np.geomspace(lowest, highest, 25)

    def paint(axes: Axes) -> None:
        for part, alpha, width in zip(values, (0.35, 0.65, 1), (1.2, 1.6, 2.2), strict=True):
            if len(part):
                counts = np.histogram(np.clip(part, lowest, highest), edges)[0]
                axes.stairs(counts / len(part), edges, color=colour(of), alpha=alpha, lw=width)
        axes.set_xscale("log")
        axes.set_xlim(lowest, highest)
        axes.xaxis.set_major_locator(FixedLocator([10.0**k for k in range(-3, 4) if lowest <= 10.0**k <= highest]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: svg.number(value)))
        axes.set_xlabel("an answer's score (nats per token)")
        axes.set_ylabel("of the answers")
        svg.percent(axes.yaxis)
        axes.set_ylim(bottom=0)

    return paint


def stages(rows: Sequence[tuple[str, dict[str, float]]]) -> Paint:
    """A bar for each row: seconds of a step, stage by stage. Rows: names and seconds."""

    def paint(axes: Axes) -> None:
        axes.grid(False)
        axes.grid(axis="x")
        for i, (_, seconds) in enumerate(rows):
            left = 0.0
            for name in STAGES:
                (bar,) = axes.barh(i, seconds.get(name, 0.0), 0.62, left, color=colour(f"stage-{name}"), lw=0)
                svg.named(bar, f"{name}: {svg.number(seconds.get(name, 0.0))} s")
                left += seconds.get(name, 0.0)
            axes.text(left, i, f" {svg.number(left)} s", va="center", fontsize=10.5)
        axes.set_yticks(range(len(rows)), [_cut(name, 20) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.18 * max(sum(seconds.values()) for _, seconds in rows))
        axes.set_xlabel("seconds of a step")
        svg.plain(axes.xaxis)

    return paint


def heat(steps: Sequence[float], names: Sequence[str], values: np.ndarray, limit: float) -> Paint:
    """A cell for each name and step, coloured from -limit over zero to limit.

    Args:
      values: [names, steps]; NaN where there is none.
    """
    scale = ListedColormap([colour(f"level-{i}") for i in range(LEVELS)])

    def paint(axes: Axes) -> None:
        axes.grid(False)
        edges = np.linspace(-limit, limit, LEVELS + 1)[1:-1]
        for i, name in enumerate(names):
            for j, value in enumerate(values[i]):
                if np.isfinite(value):
                    (cell,) = axes.barh(i, 0.96, 0.92, j + 0.02, color=scale(int(np.digitize(value, edges))), lw=0)
                    svg.named(cell, f"{name}, step {steps[j]:.0f}: {svg.number(value)}")
        every = max(1, -(-len(steps) // 6))
        axes.set_xticks(np.arange(len(steps))[::every] + 0.5, [svg.number(step) for step in steps[::every]])
        some = max(1, -(-len(names) // 14))
        axes.set_yticks(range(len(names))[::some], list(names)[::some])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, len(steps))
        axes.set_xlabel("step")

    return paint


def intervals(rows: Sequence[tuple[str, str, tuple[float, float, float]]], label: str) -> Paint:
    """A point with its interval for each row: names, colours, and (value, low, high)."""

    def paint(axes: Axes) -> None:
        axes.grid(False)
        axes.grid(axis="x")
        axes.axvline(0, color=colour("soft"), lw=0.9, ls=(0, (4, 3)))
        names = list(dict.fromkeys(name for name, _, _ in rows))
        shades = list(dict.fromkeys(shade for _, shade, _ in rows))
        for name, shade, (value, low, high) in rows:
            y = names.index(name) + 0.24 * (shades.index(shade) - (len(shades) - 1) / 2)
            axes.plot([low, high], [y, y], color=colour(shade), lw=1.8)
            axes.plot([value], [y], "o", color=colour(shade), ms=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(label)
        svg.plain(axes.xaxis)

    return paint


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
