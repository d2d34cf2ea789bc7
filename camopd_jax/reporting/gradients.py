"""Figures of the gradients, from diagnostics.jsonl: do the answers of a batch agree, and do the branches."""

from collections.abc import Iterator
from typing import Any

from camopd_jax.reporting import curves, plots
from camopd_jax.reporting.curves import Curve
from camopd_jax.reporting.plots import Line
from camopd_jax.reporting.runs import Group
from camopd_jax.reporting.sections import Panel, titled
from camopd_jax.reporting.styles import GROUP_COLOURS, Styles
from camopd_jax.reporting.tables import EMPTY, PageTable

ABOUT = (
    "Coherence: length of the sum of the answers' gradients over the sum of their lengths; 1 where all point in one "
    "direction. Small sets are coherent because they are small, so the gain in coherence by selection is given over "
    "all answers (GCG) and over as many drawn at random. Signal: length of the mean gradient, which an update follows. "
    "Conflict: the cosine between the branches' gradients; below 0 they oppose each other."
)
FIGURES = {  # by the name that the paths of its figures contain: title, unit, options of the plot
    "coherence": ("Coherence", "coherence", {"percent": True}),
    "gcg": ("Gain in coherence by selection", "over all answers", {"percent": True, "reference": 0}),
    "gcg_random": ("Gain over as many drawn at random", "over other sets", {"percent": True, "reference": 0}),
    "signal": ("Signal", "|mean gradient|", {"from_zero": True}),
    "cosine": ("Conflict of the branches", "cosine", {"reference": 0}),
    "survives": ("What is left of both gradients in their sum", "|g + d| / (|g| + |d|)", {}),
}
DASHES = {"selected": "solid", "all": "dash", "random": "dot"}  # of the sets of answers that were measured
NOTE = "Solid: selected answers; dashed: all; dotted: as many drawn at random."
Path = tuple[str, ...]  # names of blocks within blocks


def panels(styles: Styles) -> list[Panel]:
    """Coherence, gain and conflict over the steps, of each lead group that measured them."""
    shown = []
    for group in styles.leads:
        of_path = _curves(group)
        for key, (title, unit, options) in FIGURES.items():
            drawn = []
            for path, curve in of_path.items():
                if key in path:
                    names = [name for name in path[1:] if name != key]
                    colour = next((styles.parts[name] for name in names if name in styles.parts), GROUP_COLOURS[0])
                    drawn.append(Line(", ".join(names), colour, curve, DASHES.get(names[-1], "solid")))
            if drawn:
                note = NOTE if any(line.dash != "solid" for line in drawn) else ""
                shown.append(Panel(titled(title, group, styles), plots.lines(drawn, unit, **options), note))
        if layers := {", ".join(path[1:]): curve for path, curve in of_path.items() if path[0] == "layers"}:
            steps = sorted({step for curve in layers.values() for step in curve.steps})
            values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in layers.values()]
            plot = plots.heat_map(steps, list(layers), [[of_step.get(step) for step in steps] for of_step in values])
            shown.append(Panel(titled("Conflict, layer by layer", group, styles), plot, "Cosine of the gradients."))
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


def correlations(styles: Styles) -> list[PageTable]:
    """What the answers' scores correlate with, at the last step that measured it."""
    tables = []
    for group in styles.leads:
        for row in [row for row in group.run.diagnostics if row.get("correlations")][-1:]:
            of_branch = {name: values for name, values in row["correlations"].items() if values}
            rows = {name: [name.replace("_", " ")] for values in of_branch.values() for name in values}
            for values in of_branch.values():
                for name, cells in rows.items():
                    known = values.get(name) and None not in values[name]
                    cells.append("{:.2f} ({:.2f} to {:.2f})".format(*values[name]) if known else EMPTY)
            caption = f"Rank correlation of an answer's score at step {row['step']}, with 95 % confidence intervals"
            tables.append(PageTable(titled(caption, group, styles), ["with its", *of_branch], list(rows.values())))
    return [table for table in tables if table.rows]
