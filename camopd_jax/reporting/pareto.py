"""Recovery against retention: one point for each model, labelled where there is room."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from camopd_jax.reporting import svg
from camopd_jax.reporting.cast import Style
from camopd_jax.reporting.outcomes import Estimate
from camopd_jax.reporting.plots import Paint
from camopd_jax.reporting.svg import colour


@dataclass(frozen=True)
class Point:
    name: str
    style: Style
    back: Estimate  # recovery
    kept: Estimate  # retention


def pareto(points: Sequence[Point], between: Sequence[tuple[float, Estimate, Estimate]]) -> Paint:
    """Points with error bars of one standard error on both axes.

    Args:
      between: the interpolation, by the original model's weight: recovery and retention.
    """

    def paint(axes: Axes) -> None:
        axes.grid(axis="x")
        axes.axhline(1, color=colour("soft"), lw=0.9, ls=(0, (4, 3)))
        axes.plot(0, 1, "o", ms=7, mfc=colour("surface"), mec=colour("soft"), zorder=2)
        if between:
            xs, ys = [back.value for _, back, _ in between], [kept.value for _, _, kept in between]
            (path,) = axes.plot(xs, ys, "-", color=colour("soft"), lw=1, marker="s", ms=3.5, zorder=2)
            svg.named(path, "interpolation of the two models")
        for point in sorted(points, key=lambda point: not point.style.muted):
            shade = colour(point.style.colour)
            back, kept = point.back, point.kept
            axes.errorbar(back.value, kept.value, xerr=back.error, yerr=kept.error, ecolor=shade, elinewidth=1,
                          alpha=0.35 if point.style.muted else 0.7, fmt="none", zorder=3)  # fmt: skip
            (dot,) = axes.plot(back.value, kept.value, "o", color=shade, zorder=4,
                               ms=5 if point.style.muted else 8, mec=colour("surface"), mew=1)  # fmt: skip
            svg.named(dot, point.name)
        axes.set_xlabel("recovery: share of the lost general ability that is back")
        axes.set_ylabel("retention: share of the domain that is kept")
        _frame(axes, points)
        svg.percent(axes.xaxis)
        svg.percent(axes.yaxis)
        _label(axes, points, between)

    return paint


def _frame(axes: Axes, points: Sequence[Point]) -> None:
    """Limits by the models that were trained and the one they start as; the interpolation may leave them."""
    for limit, at, found in (
        (axes.set_xlim, 0.0, [p.back for p in points]),
        (axes.set_ylim, 1.0, [p.kept for p in points]),
    ):
        low = min([at, *(share.value - share.error for share in found)])
        high = max([at, *(share.value + share.error for share in found)])
        margin = max(0.1 * (high - low), 0.01)
        limit(low - margin, high + margin)


def _label(axes: Axes, points: Sequence[Point], between: Sequence[tuple[float, Estimate, Estimate]]) -> None:
    """Names beside the points, those in colour first; a name that would lie on another or on a point is left out."""
    axes.figure.canvas.draw()  # the limits are those of the drawing from here on
    place = axes.transData.transform
    dots = [place((p.back.value, p.kept.value)) for p in points]
    dots += [place((0.0, 1.0))]
    dots += [place((back.value, kept.value)) for _, back, kept in between]
    frame = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    taken.append(Bbox.from_bounds(frame.x0, place((0.0, 1.0))[1] - 1, frame.width, 2))  # the dashed line
    wanted = [(p.name, dots[i], p.style.muted) for i, p in enumerate(points)]
    wanted.sort(key=lambda of: of[2])
    wanted.append(("specialised", dots[len(points)], True))
    ends = [
        (f"{100 * weight:.0f} % original", dots[len(points) + 1 + i], True) for i, (weight, _, _) in enumerate(between)
    ]
    ends = [end for end in ends if frame.contains(*end[1])]
    for name, (x, y), soft in [*wanted, *ends[:1], *ends[-1:]]:
        width, height = 6.2 * len(name) + 4, 13
        for dx, dy in ((8, -5), (8, 7), (8, -18), (-8 - width, -5), (-8 - width, 7), (-8 - width, -18),
                       (-width / 2, 10), (-width / 2, -24)):  # fmt: skip
            box = Bbox.from_bounds(x + dx, y + dy, width, height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 8 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 8
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                left, bottom = axes.transData.inverted().transform((box.x0 + 2, box.y0 + 2.5))
                axes.text(left, bottom, name, fontsize=11, color=colour("soft" if soft else "ink"), zorder=6)
                break
