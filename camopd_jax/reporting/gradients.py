"""Figures of the gradients from diagnostics.jsonl: coherence within a batch, and conflict between branches."""

from collections.abc import Iterator
from typing import Any

from camopd_jax.reporting import curves, plots
from camopd_jax.reporting.curves import Curve
from camopd_jax.reporting.plots import Line
from camopd_jax.reporting.runs import Group
from camopd_jax.reporting.sections import Panel
from camopd_jax.reporting.styles import GROUP_COLOURS, Styles

ABOUT = (
    "Coherence: norm of the sum of the answers' gradients divided by the sum of their norms; 1 if all have the same "
    "direction. Smaller sets have a higher coherence, so the gain by selection is shown relative to all answers (GCG) "
    "and relative to random sets of the same size. Signal: norm of the mean gradient, which the update uses. Conflict: "
    "cosine between the branches' gradients; below 0 they oppose each other."
)
# Title, unit and plot options, by a key in the path of the values.
FIGURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "coherence": ("Coherence", "coherence", {"percent": True}),
    "gcg": ("Gain in coherence by selection", "relative to all answers", {"percent": True, "reference": 0}),
    "gcg_random": ("Gain over random answers", "relative to random sets", {"percent": True, "reference": 0}),
    "signal": ("Signal", "|mean gradient|", {"from_zero": True}),
    "cosine": ("Conflict of the branches", "cosine", {"reference": 0}),
    "survives": ("Share of both gradients that remains in their sum", "|g + d| / (|g| + |d|)", {}),
}
HEAT_MAPS = {  # title and note, by the first key in the path of the values
    "layers": ("Conflict by layer", "Cosine of the gradients of the first two branches."),
    "correlations": ("Correlations of the gap mass", "Rank correlation of an answer's gap mass with other values."),
}
DASHES = {"selected": "solid", "all": "dash", "random": "dot"}  # line styles of the sets of answers
NOTE = "Solid: selected answers; dashed: all answers; dotted: random answers, as many as were selected."
Path = tuple[str, ...]  # keys of nested objects


def panels(styles: Styles) -> list[Panel]:
    """Panels of coherence, gain and conflict over steps, for each lead group with diagnostics."""
    shown = []
    for group in styles.leads:
        of_path, suffix = _curves(group), f": {group.name}" if len(styles.groups) > 1 else ""
        for key, (title, unit, options) in FIGURES.items():
            drawn = []
            for path, curve in of_path.items():
                if key in path:
                    names = [name for name in path[1:] if name != key]
                    colour = next((styles.parts[name] for name in names if name in styles.parts), GROUP_COLOURS[0])
                    drawn.append(Line(", ".join(names), colour, curve, DASHES.get(names[-1], "solid")))
            if drawn:
                note = NOTE if any(line.dash != "solid" for line in drawn) else ""
                shown.append(Panel(title + suffix, plots.lines(drawn, unit, **options), note))
        for block, (title, note) in HEAT_MAPS.items():
            if rows := {
                ", ".join(path[1:]).replace("_", " "): curve for path, curve in of_path.items() if path[0] == block
            }:
                steps = sorted({step for curve in rows.values() for step in curve.steps})
                values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in rows.values()]
                plot = plots.heat_map(steps, list(rows), [[of_step.get(step) for step in steps] for of_step in values])
                shown.append(Panel(title + suffix, plot, note))
    return shown


def _curves(group: Group) -> dict[Path, Curve]:
    """Curves of all values in the group's diagnostics, by path."""

    def paths(block: Any, path: Path = ()) -> Iterator[Path]:
        if isinstance(block, dict):
            for name, part in block.items():
                yield from paths(part, (*path, name))
        else:
            yield path

    every = dict.fromkeys(path for run in group.distinct for row in run.diagnostics for path in paths(row))
    of_path = {p: curves.average_curve(group.distinct, lambda run: run.diagnostics, p) for p in every}
    return {path: curve for path, curve in of_path.items() if curve.steps}
