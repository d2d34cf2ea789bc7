"""Tables of results for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from camopd_jax.evals import tasks
from camopd_jax.evals.comparison import kept_share, recovered_share
from camopd_jax.evals.results import AXES, Result, mean_accuracy, on_axis
from camopd_jax.evals.task import Task

TEACHERS = ("general", "specialised")
TITLES = {"general": "general teacher", "student": "recovered"}


def accuracies(models: Mapping[str, Sequence[Result]]) -> Table:
    """Accuracy in % of each model, for each benchmark and as the mean of each axis.

    If the models "general" and "specialised" are included, every other model has a second column: its recovered share
    of the lost general ability (general benchmarks), or its kept share of the domain ability (domain benchmarks).

    Args:
      models: results on the same benchmarks, by the model's name.
    """
    students = _students(models)
    table = Table(
        title="Accuracy in %, ± one standard error over questions",
        caption="back: regained share of the lost general ability; kept: share of the domain's" if students else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for name in models:
        table.add_column(TITLES.get(name, name), justify="right")
        if name in students:
            table.add_column("back | kept", justify="right")
    for name, cells in accuracy_rows(models):
        table.add_row(name, *cells, style="bold" if name.endswith(": mean") else "")
    return table


def accuracy_rows(models: Mapping[str, Sequence[Result]]) -> list[tuple[str, list[str]]]:
    """The rows of `accuracies`: of each benchmark, and of the mean of each axis with several."""
    rows, students = [], _students(models)
    for axis in AXES:
        on = {name: on_axis(results, axis) for name, results in models.items()}
        names = [result["benchmark"] for result in next(iter(on.values()))]
        for i, name in enumerate(names):
            parts = {model: [part[i]] for model, part in on.items()}
            rows.append((f"{axis}: {name}", _cells(axis, parts, students)))
        if len(names) > 1:
            rows.append((f"{axis}: mean", _cells(axis, on, students)))
    return rows


def _students(models: Mapping[str, Sequence[Result]]) -> list[str]:
    """The models with a column of shares."""
    return [name for name in models if name not in TEACHERS] if models.keys() >= set(TEACHERS) else []


def _cells(axis: str, models: Mapping[str, Sequence[Result]], students: Sequence[str]) -> list[str]:
    """A row of the table: each model's mean accuracy on these benchmarks, and after a student's its share."""
    cells = []
    for name, results in models.items():
        mean, error = mean_accuracy(results)
        cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
        if name in students:
            general, specialised = (models[teacher] for teacher in TEACHERS)
            is_general = axis == "general"
            share = recovered_share(general, specialised, results) if is_general else kept_share(specialised, results)
            cells.append("" if share is None else f"{100 * share.value:.0f} ± {100 * share.error:.0f} %")
    return cells


def details(models: Mapping[str, Sequence[Result]]) -> Table:
    """The sampling settings of each benchmark, followed by length and form of each model's answers."""
    table = Table(
        title="Answers: mean number of tokens; in %: cut at the cap, without the required form",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "tokens", "cut", "no form", "also, in %"):
        table.add_column(name, justify="left" if name in ("", "also, in %") else "right")
    for results in zip(*models.values(), strict=True):
        first = results[0]
        table.add_row(f"{first['benchmark']}: {first['n']} questions", style="bold")
        table.add_row(f"{_sampling(first)}, at most {first['max_response_tokens']} tokens", style="dim")
        for model, result in zip(models, results, strict=True):
            parts = ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in result["parts"].items())
            percentages = (f"{100 * result[name]:.0f}" for name in ("truncated", "unmarked"))
            table.add_row(f"  {TITLES.get(model, model)}", f"{result['length_mean']:.0f}", *percentages, parts)
    return table


def _sampling(result: Result) -> str:
    task = tasks.TASKS.get(result["task"])
    if isinstance(task, Task) and task.grades_likelihood:
        return "given answers"
    if result["temperature"] == 0:
        return "greedy"
    defaults = (("top_k", 0), ("top_p", 1), ("min_p", 0))
    filters = [f"{name} {result[name]:g}" for name, off in defaults if result[name] != off]
    return ", ".join([f"{result['samples']} at T {result['temperature']:g}", *filters])
