"""Figures of the gradients, from diagnostics.jsonl: do the answers of a batch agree, and do the branches."""

from collections.abc import Iterator
from typing import Any

from camopd_jax.reporting import curves, plots
from camopd_jax.reporting.curves import Curve
from camopd_jax.reporting.plots import Line
from camopd_jax.reporting.runs import Group
from camopd_jax.reporting.sections import Panel
from camopd_jax.reporting.styles import GROUP_COLOURS, Styles

ABOUT = (
    "Coherence: length of the sum of the answers' gradients over the sum of their lengths; 1 where all point in one "
    "direction. Small sets are coherent because they are small, so the gain in coherence by selection is given over "
    "all answers (GCG) and over as many drawn at random. Signal: length of the mean gradient, which an update follows. "
    "Conflict: the cosine between the branches' gradients; below 0 they oppose each other."
)
# By the name that the paths of its figures contain: title, unit, options of the plot.
FIGURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "coherence": ("Coherence", "coherence", {"percent": True}),
    "gcg": ("Gain in coherence by selection", "over all answers", {"percent": True, "reference": 0}),
    "gcg_random": ("Gain over as many drawn at random", "over other sets", {"percent": True, "reference": 0}),
    "signal": ("Signal", "|mean gradient|", {"from_zero": True}),
    "cosine": ("Conflict of the branches", "cosine", {"reference": 0}),
    "survives": ("What is left of both gradients in their sum", "|g + d| / (|g| + |d|)", {}),
}
HEAT_MAPS = {  # by the block that holds their figures: title, note
    "layers": ("Conflict, layer by layer", "Cosine of the gradients of the first two branches."),
    "correlations": ("What the scores correlate with", "Rank correlation of an answer's score with its other figures."),
}
DASHES = {"selected": "solid", "all": "dash", "random": "dot"}  # of the sets of answers that were measured
NOTE = "Solid: selected answers; dashed: all; dotted: as many drawn at random."
Path = tuple[str, ...]  # names of blocks within blocks


def panels(styles: Styles) -> list[Panel]:
    """Coherence, gain and conflict over the steps, of each lead group that measured them."""
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
    """Every figure of the group's diagnostics over the steps, by its path."""

    def paths(block: Any, path: Path = ()) -> Iterator[Path]:
        if isinstance(block, dict):
            for name, part in block.items():
                yield from paths(part, (*path, name))
        else:
            yield path

    every = dict.fromkeys(path for run in group.distinct for row in run.diagnostics for path in paths(row))
    of_path = {p: curves.average_curve(group.distinct, lambda run: run.diagnostics, p) for p in every}
    return {path: curve for path, curve in of_path.items() if curve.steps}
