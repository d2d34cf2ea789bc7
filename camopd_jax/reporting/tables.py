"""The page's tables: results, differences, the sweep, the runs and how their configs differ."""

import json
from collections.abc import Sequence
from typing import Any

from camopd_jax.config.identity import differing
from camopd_jax.config.methods import CONTROLS, INTERPOLATION
from camopd_jax.reporting.blocks import Cell, Table
from camopd_jax.reporting.cast import Cast
from camopd_jax.reporting.outcomes import Column, Interval, Outcome, columns, difference, estimate, reference
from camopd_jax.reporting.runs import Group, Source
from camopd_jax.reporting.svg import minus, number

TITLES = {"recovery": "back", "retention": "kept"}
NO = "\u2013"  # a dash
NONE = Cell(NO)


def results(outcomes: Sequence[Outcome], cast: Cast) -> Table:
    """Every group's shares, with their standard errors."""
    shown = columns(outcomes)
    rows = []
    for of in outcomes:
        cells = [estimate(of, column) for column in shown]
        over = {cell.over for cell in cells if cell}
        n = len(of.finals) if over == {"seeds"} else next(iter(of.finals.values())).questions
        tokens = [run.tokens for run in of.group.distinct if run.tokens]
        step = max(last.step for last in of.finals.values())
        rows.append([
            _name(of.group, cast), Cell(_rate(of.group)), Cell(str(step)), Cell(f"{n} {next(iter(over), NO)}"),
            Cell(number(sum(tokens) / len(tokens)) if tokens else NO),
            *(Cell(minus(f"{100 * cell.value:.1f} ± {100 * cell.error:.1f}"), column[1] == "mean") if cell else NONE
              for cell, column in zip(cells, shown, strict=True)),
        ])  # fmt: skip
    head = ["", "rate", "step", "error over", "tokens sampled"]
    return Table(
        "In %, ± one standard error. Back: of the general ability that was lost, what has returned. Kept: of the "
        "domain's, what is still there. Tokens: of one run's answers.",
        [*head, *map(_heading, shown)],
        rows,
    )


def differences(outcomes: Sequence[Outcome], cast: Cast, method: str) -> Table | None:
    """How far every group is from one method."""
    shown = columns(outcomes)
    rows = []
    for of in outcomes:
        theirs = reference(outcomes, of, method)
        if theirs is None or theirs is of:
            continue
        found = [difference(of, theirs, column) for column in shown]
        kept = [interval for interval in found if interval]
        paired = f"{kept[0].n} {kept[0].over}" if kept else NO
        rows.append([
            _name(of.group, cast), Cell(paired),
            *(Cell(_interval(cell), cell.sure) if cell else NONE for cell in found),
        ])  # fmt: skip
    if not any(cell is not NONE for row in rows for cell in row[2:]):
        return None
    return Table(
        f"Less that of {method}: percentage points, with 95 % confidence intervals (Student's t, paired; not corrected "
        "for the number of comparisons). Bold: the interval leaves out zero.",
        ["", "paired over", *map(_heading, shown)],
        rows,
    )


def _interval(of: Interval) -> str:
    return minus(f"{100 * of.value:+.1f} ({100 * of.low:+.1f} to {100 * of.high:+.1f})")


def _heading(column: Column) -> str:
    return f"{TITLES[column[0]]}: {column[1]}"


def _name(group: Group, cast: Cast) -> Cell:
    return Cell(group.name + ", tuning" * group.tuning, about=_about(group), colour=cast.style(group).colour)


def _about(group: Group) -> str:
    return CONTROLS[group.method].about if group.method in CONTROLS else ""


def _rate(group: Group) -> str:
    """What a grid chose: a learning rate, or the interpolation's weight. Of a run alone, its learning rate."""
    setting = group.run.config["optimizer"]["learning_rate"] if group.setting is None else group.setting
    return f"{setting:g}"


def sweep(source: Source) -> list[Table]:
    """The merits by which a grid chose each method's learning rate, and the interpolation's weight."""
    tried = {method: {float(setting): merit for setting, merit in found.items()}
             for method, found in source.merits.items() if found}  # fmt: skip
    between = {method: tried.pop(method) for method in (INTERPOLATION,) if method in tried}
    what = f"{source.folder.name}: mean of recovery and retention in %, on the questions that choose, one run each, by"
    bold = "Bold: the best." if source.study else "Bold: the best so far."
    return [_merits(found, f"{what} {of}. {bold}")
            for found, of in ((tried, "learning rate"), (between, "the original model's weight")) if found]  # fmt: skip


def _merits(tried: dict[str, dict[float, float]], caption: str) -> Table:
    settings = sorted({setting for found in tried.values() for setting in found})
    best = {method: max(found, key=found.get) for method, found in tried.items()}
    rows = [
        [
            Cell(method),
            *(Cell(minus(f"{100 * found[s]:.1f}"), s == best[method]) if s in found else NONE for s in settings),
        ]
        for method, found in tried.items()
    ]
    return Table(caption, ["", *(f"{setting:g}" for setting in settings)], rows)


def essentials(cast: Cast) -> Table:
    """What each group is and how far it has come."""
    rows = []
    for group in cast.groups:
        runs, config = group.distinct, group.run.config
        models = [config.get(field) for field in ("general_model", "specialised_model", "model")]
        steps = [run.steps for run in runs]
        done = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
        ended = sum(run.ended for run in runs)
        state = "ended" if ended == len(runs) else "in progress" if not ended else f"{ended} of {len(runs)} ended"
        rows.append([
            _name(group, cast),
            Cell(_about(group) or ("supervised fine-tuning" if "model" in config else "as its config says")),
            Cell(" → ".join(model for model in models if model)),
            Cell(f"{done} of {config['steps']}"),
            Cell(", ".join(map(str, dict.fromkeys(run.config["seed"] for run in runs)))),
            Cell(state),
        ])  # fmt: skip
    return Table("The runs of this page.", ["", "method", "models", "steps", "seeds", "state"], rows)


def configs(cast: Cast) -> Table | None:
    """The fields in which the groups' configs differ; of a group, its first run's."""
    found = differing([group.run.config for group in cast.groups])
    if not found:
        return None
    rows = [[_name(group, cast), *(_value(values[i], values[i] != values[0]) for values in found.values())]
            for i, group in enumerate(cast.groups)]  # fmt: skip
    return Table(
        "Fields of the configs that are not the same in all. Bold: other than in the first row.", ["", *found], rows
    )


def _value(value: Any, strong: bool) -> Cell:
    text = NO if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Cell(text, strong) if len(text) <= 48 else Cell(text[:47] + "…", strong, about=text)
