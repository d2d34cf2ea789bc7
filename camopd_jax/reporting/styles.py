"""The colours of the page, its two themes, and the assignment of colours to groups and branches."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from camopd_jax.config.methods import REFERENCE_METHODS
from camopd_jax.reporting.runs import Group

# Lines and markers have medium lightness, readable on white and on black; other colours depend on the theme.
COMPARED_COLOURS = {"camopd": "#3f8f29", "vanilla": "#d6498f"}  # the same on every page
GROUP_COLOURS = ("#7a6ef2", "#a8860f", "#1f9fb5", "#b0563f")
PART_COLOURS = ("#2f7de0", "#d9701c", "#17a07a", "#a35bd1", "#b8860b", "#d1495b")  # of branches and other phases
MUTED = "#8a939e"
STAGES = {"rollout": "#5b7aa8", "score": "#8aa7cf", "select": "#c9a227", "update": "#c46f4a", "other": "#9aa2ac"}
LESS, MORE = "#c47828", "#3f938a"  # for tokens less and more likely, and the ends of the diverging scale
DIVERGING = [[0, LESS], [0.5, "rgba(128, 128, 128, 0.12)"], [1, MORE]]
THEMES = {
    "light": {"surface": "#ffffff", "raised": "#f5f6f8", "ink": "#1b1f24", "soft": "#5a626c", "grid": "#e3e6ea"},
    "dark": {"surface": "#15181c", "raised": "#1d2127", "ink": "#e8eaed", "soft": "#a4adb8", "grid": "#2c323a"},
}


def template(theme: dict[str, str]) -> go.layout.Template:
    """Plotly's settings of all figures in a theme."""
    axis = {"gridcolor": theme["grid"], "linecolor": theme["soft"], "zeroline": False, "automargin": True}
    layout = {
        "font": {"color": theme["soft"], "size": 12, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "margin": {"l": 50, "r": 10, "t": 10, "b": 40},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": theme["raised"], "font": {"color": theme["ink"]}, "namelength": -1},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"color": theme["ink"]}},
        "xaxis": axis | {"showline": True},
        "yaxis": axis,
    }
    bars = {"thickness": 1, "width": 0}
    return go.layout.Template(layout=layout, data={"scatter": [{"error_x": bars, "error_y": bars}]})


@dataclass(frozen=True)
class Styles:
    """All groups in the order of the legends, and the colours of groups and of the parts of runs (branches, phases)."""

    groups: list[Group]
    colours: dict[str, str]
    parts: dict[str, str]

    @property
    def leads(self) -> list[Group]:
        """The first groups, which have separate figures if a figure can show only one group."""
        return self.groups[:3]


def assign_styles(groups: Sequence[Group]) -> Styles:
    """Orders groups with CaMOPD and vanilla first, and assigns colours; groups without a free colour are grey."""
    ordered = sorted(groups, key=lambda group: group.method not in REFERENCE_METHODS)
    colours: dict[str, str] = {}
    free = list(GROUP_COLOURS)
    for group in ordered:
        own = COMPARED_COLOURS.get(group.method or "")
        colours[group.name] = own if own and own not in colours.values() else free.pop(0) if free else MUTED
    parts = dict.fromkeys(name for group in ordered for run in group.distinct for name in run.parts)
    repeated = PART_COLOURS * (1 + len(parts) // len(PART_COLOURS))
    return Styles(ordered, colours, dict(zip(parts, repeated, strict=False)))
