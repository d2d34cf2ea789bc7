"""Every colour of the page, the looks of its figures on both themes, and which group is drawn in which colour."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from camopd_jax.config.methods import AGAINST
from camopd_jax.reporting.runs import Group

# Lines and marks are of medium lightness, to be read on white and on black alike; the rest follows the theme.
COMPARED_COLOURS = {"camopd": "#3f8f29", "vanilla": "#d6498f"}  # the same on every page
GROUP_COLOURS = ("#7a6ef2", "#a8860f", "#1f9fb5", "#b0563f")
PART_COLOURS = ("#2f7de0", "#d9701c", "#17a07a", "#a35bd1", "#b8860b", "#d1495b")  # of branches, and other steps
MUTED = "#8a939e"
STAGES = {"rollout": "#5b7aa8", "score": "#8aa7cf", "select": "#c9a227", "update": "#c46f4a", "other": "#9aa2ac"}
LESS, MORE = "#c47828", "#3f938a"  # less and more likely: tints of tokens, and the ends of the diverging scale
DIVERGING = [[0, LESS], [0.5, "rgba(128, 128, 128, 0.12)"], [1, MORE]]
THEMES = {
    "light": {"surface": "#ffffff", "raised": "#f5f6f8", "ink": "#1b1f24", "soft": "#5a626c", "grid": "#e3e6ea"},
    "dark": {"surface": "#15181c", "raised": "#1d2127", "ink": "#e8eaed", "soft": "#a4adb8", "grid": "#2c323a"},
}


def template(theme: dict[str, str]) -> go.layout.Template:
    """Plotly's settings for all figures on one theme."""
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
    """All groups in the order in which legends name them, and the colours of groups and of parts of runs."""

    groups: list[Group]
    colours: dict[str, str]
    parts: dict[str, str]

    @property
    def leads(self) -> list[Group]:
        """The few groups that have figures of their own, where a figure holds only one."""
        return self.groups[:3]


def choose_styles(groups: Sequence[Group]) -> Styles:
    """CaMOPD and vanilla come first, then the others; those that are more than the colours are grey."""
    ordered = sorted(groups, key=lambda group: group.method not in AGAINST)
    colours: dict[str, str] = {}
    free = list(GROUP_COLOURS)
    for group in ordered:
        own = COMPARED_COLOURS.get(group.method or "")
        colours[group.name] = own if own and own not in colours.values() else free.pop(0) if free else MUTED
    parts = dict.fromkeys(name for group in ordered for run in group.distinct for name in run.parts)
    repeated = PART_COLOURS * (1 + len(parts) // len(PART_COLOURS))
    return Styles(ordered, colours, dict(zip(parts, repeated, strict=False)))
