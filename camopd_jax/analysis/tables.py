"""Tables of the figures of `analyze` for the terminal."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from camopd_jax.analysis.gradients import SETS
from camopd_jax.analysis.selection import FEATURES, Interval

SHOWN_SOURCES = 12


def diagnosis_tables(row: dict[str, Any]) -> Iterator[Table]:
    """The tables of one row of diagnostics.jsonl."""
    yield _coherence(row)
    if row["conflict"]:  # empty if the run has one branch
        yield _conflict(row)
    yield _correlations("Rank correlation of an answer's gap mass with", row["correlations"])
    training = row.get("training")
    if training:
        steps = " and ".join(f"{figures['steps']} of {branch}" for branch, figures in training.items())
        of_branch = {branch: figures["correlations"] for branch, figures in training.items()}
        yield _correlations(f"The same over the run, mean of {steps} steps", of_branch)
        yield _training(training)


def _view(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    view = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, name in enumerate(columns):
        view.add_column(name, justify="right" if i else "left")
    return view


def _coherence(row: dict[str, Any]) -> Table:
    view = _view(
        f"Gradients of {row['rows']} answers a branch, after {row['step']} steps",
        ("", "answers", "coherence", "signal", "the selection's gain, %"),
        "coherence: |sum g| / sum |g|; signal: |mean g|; random: sets of the selection's size",
    )
    for branch, figures in row["branches"].items():
        gains = {"all": figures["gcg"], "random": figures["gcg_random"]}
        for name in (*SETS, "random"):
            fraction = f" ({100 * figures['selected_fraction']:.0f} %)" if name == "selected" else ""
            first, gain = (branch, "") if name == "selected" else ("", _percent(gains[name]))
            coherence, signal = _number(figures["coherence"][name]), _number(figures["signal"][name])
            view.add_row(first, name + fraction, coherence, signal, gain)
    return view


def _conflict(row: dict[str, Any]) -> Table:
    view = _view(
        f"The gradients of {' and '.join(list(row['branches'])[:2])} against each other",
        ("answers", "dot product", "cosine", "survives, %"),
        "survives: |g + d| / (|g| + |d|), what a mixed step keeps of both lengths",
    )
    for name, pair in row["conflict"].items():
        view.add_row(name, _number(pair["dot"]), _number(pair["cosine"]), _percent(pair["survives"]))
    view.add_section()
    for group, cosine in row["layers"].items():
        view.add_row(f"all, {group}", _number(row["layer_dots"][group]), _number(cosine), "")
    return view


def _correlations(title: str, of_branch: dict[str, dict[str, Interval]]) -> Table:
    view = _view(title, ("", *of_branch), "Spearman, with 95 % confidence intervals")
    names = list(dict.fromkeys(name for intervals in of_branch.values() for name in intervals))
    for name in names[: len(FEATURES) + SHOWN_SOURCES]:
        view.add_row(name.replace("_", " "), *(_interval(intervals.get(name)) for intervals in of_branch.values()))
    return view


def _training(training: dict[str, Any]) -> Table:
    """Lengths and repeated prompts over a run, with a column for each branch."""
    view = _view("What was selected over the run", ("", *training))

    def add(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        view.add_row(title, *(cell(figures) for figures in training.values()))

    add("length of the selected, tokens", lambda t: _interval(t["lengths"].get("selected")))
    add("length of all", lambda t: _interval(t["lengths"].get("all")))
    add("difference within a step", lambda t: _interval(t["lengths"].get("difference")))
    add("prompts that came", lambda t: str(t["repeats"]["prompts"]))
    add("times each came, mean", lambda t: _number(t["repeats"]["asked"]))
    add("times selected, mean", lambda t: _number(t["repeats"]["selected"]))
    add("came again: never selected, %", lambda t: _percent(t["repeats"]["never"]))
    add("came again: always selected, %", lambda t: _percent(t["repeats"]["always"]))
    add("selected, if it was the time before", lambda t: _interval(t["repeats"]["again"]))
    add("selected, if it was not", lambda t: _interval(t["repeats"]["anew"]))
    sources = dict.fromkeys(name for figures in training.values() for name in figures.get("by_source", {}))
    for name in list(sources)[:SHOWN_SOURCES]:
        rates = [figures.get("by_source", {}).get(name) for figures in training.values()]
        view.add_row(f"selected of source {name}", *map(_interval, rates))
    return view


def _interval(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ({value[1]:.2f}, {value[2]:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"
