"""The page's tables: results, differences, the sweep, the runs and how their configs differ."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from camopd_jax.config.identity import differing
from camopd_jax.config.methods import INTERPOLATION
from camopd_jax.reporting.results import Column, columns, difference, reference
from camopd_jax.reporting.runs import Group, Source

TITLES = {"recovery": "back", "retention": "kept"}
EMPTY = "\u2013"  # a dash


@dataclass(frozen=True)
class PageTable:
    """Rows begin with their name, or with the group that they are of. `words`: cells are texts, not numbers."""

    caption: str
    head: list[str]
    rows: list[list[Group | str]]
    words: bool = False


def results(groups: Sequence[Group]) -> PageTable:
    """Every group's recovery and retention in per cent, with their standard errors."""
    shown, rows = columns(groups), []
    for group in groups:
        over = (
            f"{sum(row['n'] for row in group.single[-1])} questions" if group.single else f"{len(group.results)} seeds"
        )
        tokens = sum(row.get("response_tokens") or 0 for run in group.distinct for row in run.metrics)
        # What a grid chose: a learning rate, or the interpolation's weight. Of a run alone, its learning rate.
        setting = group.run.config["optimizer"]["learning_rate"] if group.setting is None else group.setting
        step = max(run.final[0] for run in group.distinct if run.final)
        about = [f"{setting:g}", str(step), over, f"{tokens / len(group.distinct):,.0f}" if tokens else EMPTY]
        estimates = [group.estimate(column) for column in shown]
        cells = [f"{100 * each.value:.1f} ± {100 * each.error:.1f}" if each else EMPTY for each in estimates]
        rows.append([group, *about, *cells])
    caption = (
        "In %, ± one standard error. Back: how much of the lost general ability has returned. Kept: how much of the "
        "domain's ability is still there. Tokens: of one run's answers."
    )
    return PageTable(caption, ["", "rate", "step", "error over", "tokens sampled", *map(_heading, shown)], rows)


def differences(groups: Sequence[Group], method: str) -> PageTable | None:
    """How far every group is from one method; None where none can be compared."""
    shown, rows = columns(groups), []
    for group in groups:
        if other := reference(groups, group, method):
            cells, over = [], EMPTY
            for each in (difference(group, other, column) for column in shown):
                cells.append(EMPTY)
                if each:
                    (low, high), over = each.interval, f"{each.n} {each.over}"
                    text = f"{100 * each.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                    # Without width it says nothing: two seeds that differ by the same amount measure no spread.
                    cells[-1] = _bold(text, low < high and low * high > 0)
            rows.append([group, over, *cells])
    caption = (
        f"Difference from {method}: percentage points, with 95 % confidence intervals (Student's t, paired; not "
        "corrected for the number of comparisons). Bold: the interval excludes zero."
    )
    table = PageTable(caption, ["", "paired over", *map(_heading, shown)], rows)
    return table if any(cell != EMPTY for row in rows for cell in row[1:]) else None


def sweep(source: Source) -> list[PageTable]:
    """The merits by which a grid chose each method's learning rate, and the interpolation's weight."""
    tables = []
    for by, is_weight in (("learning rate", False), ("the original model's weight", True)):
        methods = [name for name, merits in source.merits.items() if merits and (name == INTERPOLATION) == is_weight]
        settings = sorted({float(setting) for name in methods for setting in source.merits[name]})
        rows = []
        for name in methods:
            merits = {float(setting): merit for setting, merit in source.merits[name].items()}
            cells = {s: _bold(f"{100 * merit:.1f}", merit == max(merits.values())) for s, merit in merits.items()}
            rows.append([name, *(cells.get(setting, EMPTY) for setting in settings)])
        caption = (
            f"{source.folder.name}: mean of recovery and retention in %, on the questions that choose, one run each, "
            f"by {by}. Bold: the best{'' if source.study else ' so far'}."
        )
        tables += [PageTable(caption, ["", *(f"{setting:g}" for setting in settings)], rows)] if rows else []
    return tables


def runs(groups: Sequence[Group]) -> PageTable:
    """What each group is and how far it has come."""
    rows = []
    for group in groups:
        of_group, config = group.distinct, group.run.config
        models = [config.get(field) for field in ("general_model", "specialised_model", "model")]
        steps = dict.fromkeys(str(steps) for steps in sorted({run.steps for run in of_group}))
        ended = sum(run.ended for run in of_group)
        state = {0: "in progress", len(of_group): "ended"}.get(ended, f"{ended} of {len(of_group)} ended")
        method = group.about or ("supervised fine-tuning" if "model" in config else "as its config says")
        seeds = ", ".join(str(run.config["seed"]) for run in of_group)
        models, progress = " → ".join(filter(None, models)), f"{' or '.join(steps)} of {config['steps']}"
        rows.append([group, method, models, progress, seeds, state])
    head = ["", "method", "models", "steps", "seeds", "state"]
    return PageTable("The runs of this page.", head, rows, words=True)


def configs(groups: Sequence[Group]) -> PageTable | None:
    """The fields in which the groups' configs differ; of a group, its first run's."""
    fields = differing([group.run.config for group in groups]) if groups else {}
    text = {
        name: [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        for name, values in fields.items()
    }
    rows = [[group, *(_bold(of[i], of[i] != of[0]) for of in text.values())] for i, group in enumerate(groups)]
    caption = "Fields of the configs that are not the same in all. Bold: other than in the first row."
    return PageTable(caption, ["", *fields], rows, words=True) if fields else None


def failed(sources: Sequence[Source]) -> PageTable | None:
    """The runs of finished grids that failed, and why."""
    rows = [list(item) for source in sources for item in source.study.get("failed", {}).items()]
    return PageTable("Runs that failed.", ["run", "reason"], rows, words=True) if rows else None


def _heading(column: Column) -> str:
    return f"{TITLES[column[0]]}: {column[1]}"


def _bold(text: str, is_bold: bool) -> str:
    return Markup("<b>{}</b>").format(text) if is_bold else text
