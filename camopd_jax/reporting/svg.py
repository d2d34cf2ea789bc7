"""Matplotlib figures as inline SVG in the page's own font and colours.

Figures are drawn in sentinel colours, one for each CSS custom property of page.html; the SVG that comes out names the
properties in their place, so that one drawing serves the light and the dark theme.
"""

import io
import itertools
import re
from collections.abc import Callable

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

GROUPS = 6  # colours of methods and runs
LEVELS = 9  # of the diverging scale; the middle one is zero
STAGES = ("rollout", "score", "select", "update", "other")
NAMES = (
    "ink", "soft", "grid", "surface", "muted", "recovery", "review",
    *(f"group-{i}" for i in range(1, GROUPS + 1)),
    *(f"level-{i}" for i in range(LEVELS)),
    *(f"stage-{name}" for name in STAGES),
)  # fmt: skip
_SENTINELS = {name: f"#0a0b{16 + i:02x}" for i, name in enumerate(NAMES)}
SMALLEST, SMALL, WIDE = (170, 140), (360, 232), (560, 430)  # width and height in CSS pixels

_SETTINGS = {
    "svg.fonttype": "none", "font.size": 11, "axes.labelsize": 11, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
    "axes.linewidth": 0.8, "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "path.simplify": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "xtick.major.size": 3, "ytick.major.size": 0, "xtick.major.pad": 3, "ytick.major.pad": 4,
    "xtick.color": _SENTINELS["soft"], "ytick.color": _SENTINELS["soft"], "axes.edgecolor": _SENTINELS["soft"],
    "axes.labelcolor": _SENTINELS["soft"], "text.color": _SENTINELS["ink"], "grid.color": _SENTINELS["grid"],
    "grid.linewidth": 0.8, "axes.unicode_minus": True,
}  # fmt: skip


def colour(name: str) -> str:
    """What to draw in, for the page's colour `name`."""
    return _SENTINELS[name]


def draw(paint: Callable[[Axes], None], label: str, size: tuple[int, int] = SMALL, left: int = 50) -> Markup:
    """One plot as an `<svg>` that scales with its container.

    Args:
      paint: draws on the axes.
      label: what it shows, for those who cannot see it.
      size: width and height. left: room for the labels of the vertical axis. All in CSS pixels.
    """
    width, height = size
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left / width, 38 / height, (width - left - 12) / width, (height - 64) / height))
        axes.grid(axis="y")
        paint(axes)
        figure.text(0, 1 - 12 / height, axes.get_ylabel(), color=_SENTINELS["soft"])  # level: easier to read
        axes.set_ylabel("")
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return _inline(out.getvalue(), label)


def named(artist, name: str) -> None:
    """Gives an artist a tooltip."""
    artist.set_gid(_TIP + name.encode().hex())


_TIP = "tip-"
_numbers = itertools.count()  # ids of one page must differ


def _inline(text: str, label: str) -> Markup:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    box = re.search(r'viewBox="([^"]+)"', text)[1]
    head = f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg" '
    head += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    text = re.sub(r"<svg.*?>", lambda _: head, text, count=1, flags=re.S)
    text = re.sub(rf'<g id="{_TIP}([0-9a-f]+)">', _tooltip, text)
    # Of the other ids, only those that something refers to.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    number = next(_numbers)
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="f{number}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#f{number}-", text)
    for name, sentinel in _SENTINELS.items():
        text = text.replace(sentinel, f"var(--{name})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)  # the page's own font
    text = re.sub(r" font-family: [^;]+;", "", text)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, text)
    text = re.sub(r"<defs>\s*</defs>|<g/>|<g>\s*</g>", "", text)
    return Markup(re.sub(r"\s*\n\s*", "\n", text))


def _tooltip(group: re.Match) -> str:
    return f"<g><title>{escape(bytes.fromhex(group[1]).decode())}</title>"


def _rounded(attribute: re.Match) -> str:
    """Coordinates to a tenth of a pixel."""
    return re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), attribute[0])


# ------------------------------------------------------------------------------------- axes


NICE = [1, 2, 2.5, 5, 10]  # what ticks are multiples of


def minus(text: str) -> str:
    """With the sign that is as wide as a digit."""
    return text.replace("-", "\u2212")


def number(value: float) -> str:
    """A number as an axis or a table shows it: three figures, no powers of ten written out."""
    size = abs(value)
    if size >= 1e6:
        return minus(f"{value / 1e6:.3g}M")
    if size >= 1e4:
        return minus(f"{value / 1e3:.3g}k")
    return minus(f"{value:,.0f}" if size >= 100 else f"{value:.3g}")


def percent(axis) -> None:
    """Labels an axis of shares in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: minus(f"{100 * value:.3g} %")))
    axis.set_major_locator(MaxNLocator(5, steps=NICE))


def plain(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_major_locator(MaxNLocator(5, steps=NICE))


def steps(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_major_locator(MaxNLocator(5, steps=NICE, integer=True))
