"""The tables of the page: results, differences, tuning, runs, and differences of their configs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from camopd_jax.analysis import study
from camopd_jax.analysis.study import Mean
from camopd_jax.config.identity import field_differences
from camopd_jax.evals.comparison import rank_of
from camopd_jax.evals.outcome import outcome
from camopd_jax.reporting.results import columns, difference, reference
from camopd_jax.reporting.runs import Directory, FileRow, Group

TITLES = {"recovery": "back", "retention": "kept"}
EMPTY = "\u2013"  # a dash


@dataclass(frozen=True)
class PageTable:
    """A table. The first cell of a row is a name or a group. `words`: cells are text, not numbers."""

    caption: str
    head: list[str]
    rows: Sequence[Sequence[Group | str]]
    words: bool = False


COSTS = (study.sampled_tokens, study.run_seconds)  # of a run


def outcome_of(groups: Sequence[Group]) -> PageTable | None:
    """What came back, what was kept and what did not come back, in words; None unless there is one run."""
    if len(groups) != 1 or groups[0].single is None:
        return None
    benchmarks = groups[0].run.config["evaluation"]["benchmarks"]
    rows = outcome(*groups[0].single, {one["name"]: one.get("covered") for one in benchmarks})
    return PageTable("", ["outcome", ""], rows, words=True) if rows else None


def results(groups: Sequence[Group]) -> PageTable:
    """Recovery and retention of every group in %, with standard errors."""
    shown = columns(groups)
    rows: list[list[Group | str]] = []
    heads = [f"{TITLES[measure]}: {benchmark}" for measure, benchmark in shown]
    for group in groups:
        questions = sum(row["n"] for row in group.single[-1]) if group.single else 0
        over = f"{questions} questions" if questions else f"{len(group.results)} seeds"
        steps = [run.metrics for run in group.distinct if run.metrics]
        # For a grid, the setting it chose: a learning rate or the interpolation's weight. Else the learning rate.
        setting = group.run.config["optimizer"]["learning_rate"] if group.setting is None else group.setting
        step = max(run.final[0] for run in group.distinct if run.final)
        cost = [f"{study.mean(of(rows) for rows in steps).value:,.0f}" if steps else EMPTY for of in COSTS]
        about = [f"{setting:g}", str(step), over, cost[0]]
        estimates = [group.estimate(column) for column in shown]
        cells = [f"{100 * each.value:.1f} ± {100 * (each.error or 0):.1f}" if each else EMPTY for each in estimates]
        rows.append([group, *about, *cells, cost[1]])
    caption = (
        "In %, ± one standard error. Back: recovered share of the lost general ability. Kept: share of the domain "
        "ability that is kept. Tokens sampled: in the answers of one run. Seconds: of its steps, without compilation."
    )
    return PageTable(caption, ["", "rate", "step", "error over", "tokens sampled", *heads, "seconds"], rows)


def differences(groups: Sequence[Group], method: str) -> PageTable | None:
    """Differences of every group from one method; None if no group can be compared."""
    shown = columns(groups)
    rows: list[list[Group | str]] = []
    heads = [f"{TITLES[measure]}: {benchmark}" for measure, benchmark in shown]
    for group in groups:
        if other := reference(groups, group, method):
            pairs = [difference(group, other, column) for column in shown]
            over = "questions" if group.single and other.single else "seeds"
            count = next((f"{pair.n} {over}" for pair in pairs if pair), EMPTY)
            rows.append([group, count, *(_interval(pair) if pair else EMPTY for pair in pairs)])
    caption = (
        f"Difference from {method} in percentage points, with 95 % confidence intervals (Student's t, paired; not "
        "corrected for the number of comparisons). Bold: the interval does not include zero."
    )
    table = PageTable(caption, ["", "paired over", *heads], rows)
    return table if any(cell != EMPTY for row in rows for cell in row[1:]) else None


def sweep(directory: Directory) -> PageTable | None:
    """The merit of each setting that a grid tried."""
    rows = []
    for method, merits in directory.merits.items():
        best = max(merits.values(), default=None)
        in_order = sorted(merits.items(), key=lambda pair: float(pair[0]))
        rows.append([method, *(_bold(f"{setting}: {100 * merit:.1f}", merit == best) for setting, merit in in_order)])
    caption = (
        f"{directory.folder.name}: choice of settings. Each cell has a learning rate (for the interpolation, the "
        "original model's weight) and the average of recovery and retention in % of one run, on the questions for "
        "tuning. "
        f"Bold: the best{'' if directory.study else ' so far'}."
    )
    return PageTable(caption, [], rows) if rows else None


def starts(groups: Sequence[Group]) -> PageTable | None:
    """Recovery and retention of each tried start, one row for each run; None if no run tried any."""
    tried = [(group, run.trials) for group in groups for run in group.distinct if run.trials]
    weights = sorted({row["interpolation"] for _, trials in tried for row in trials})
    rows: list[list[Group | str]] = []
    for group, trials in tried:
        by_weight = {row["interpolation"]: row for row in trials}
        best = max(by_weight, key=lambda weight: (rank_of(by_weight[weight]), -weight))
        rows.append([group, *(_bold(_trial(by_weight.get(weight)), weight == best) for weight in weights)])
    caption = (
        "Trials of the student's start. Each column is a weight of the original model; its cells have recovery and "
        "retention in % before the first step. Bold: the start of the run, which has the highest recovery of those "
        "that keep the domain up to one standard error."
    )
    return PageTable(caption, ["", *(f"{weight:g}" for weight in weights)], rows) if rows else None


def _trial(row: FileRow | None) -> str:
    """Recovery and retention of a start, such as "52.3 / 95.0"."""
    means = [row[measure].get("mean") for measure in TITLES] if row else []
    return " / ".join(f"{100 * mean[0]:.1f}" if mean else EMPTY for mean in means) or EMPTY


def runs(groups: Sequence[Group]) -> PageTable:
    """Method, models, progress and state of each group."""
    rows: list[list[Group | str]] = []
    for group in groups:
        of_group, config = group.distinct, group.run.config
        method = group.about or ("supervised fine-tuning" if "model" in config else "as its config says")
        models = [config.get(field) for field in ("general_model", "specialised_model", "model")]
        steps = f"{min(run.steps for run in of_group)} of {config['steps']}"
        seeds = ", ".join(str(run.config["seed"]) for run in of_group)
        state = "ended" if all(run.ended for run in of_group) else "in progress"
        rows.append([group, method, " → ".join(filter(None, models)), steps, seeds, state])
    head = ["", "method", "models", "steps", "seeds", "state"]
    return PageTable("The runs of this page. Steps: the minimum over the runs of a row.", head, rows, words=True)


def configs(groups: Sequence[Group]) -> PageTable | None:
    """The config fields that differ between groups; each group is represented by its first run."""
    fields = field_differences([group.run.config for group in groups]) if groups else {}
    text = {
        name: [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        for name, values in fields.items()
    }
    rows: list[list[Group | str]] = [
        [group, *(_bold(of[i], of[i] != of[0]) for of in text.values())] for i, group in enumerate(groups)
    ]
    caption = "Config fields that differ between rows. Bold: different from the first row."
    return PageTable(caption, ["", *fields], rows, words=True) if fields else None


def failed(directories: Sequence[Directory]) -> PageTable | None:
    """The failed runs of finished grids, with reasons."""
    rows = [list(item) for directory in directories for item in directory.study.get("failed", {}).items()]
    return PageTable("Runs that failed.", ["run", "reason"], rows, words=True) if rows else None


def _interval(pair: Mean) -> str:
    """A difference with its interval, bold if the interval excludes zero; an interval without width is never bold."""
    half = study.half_width(pair.error or 0, pair.n)
    text = f"{100 * pair.value:+.1f} ({100 * (pair.value - half):+.1f} to {100 * (pair.value + half):+.1f})"
    return _bold(text, 0 < half < abs(pair.value))


def _bold(text: str, is_bold: bool) -> str:
    return Markup("<b>{}</b>").format(text) if is_bold else text
