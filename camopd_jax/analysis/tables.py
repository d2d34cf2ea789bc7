"""A diagnosis on the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from camopd_jax.analysis.gradients import SETS
from camopd_jax.analysis.selection import Interval

SHOWN_SOURCES = 12


def of_row(row: dict[str, Any]) -> Iterator[Table]:
    """Tables of what `analyze` found."""
    yield _coherence(row)
    yield _conflict(row)
    yield _correlations("Rank correlation of an answer's score with", row["correlations"])
    training = row.get("training")
    if training:
        steps = " and ".join(f"{told['steps']} of {branch}" for branch, told in training.items())
        yield _correlations(
            f"The same over the run, mean of {steps} steps", {b: told["correlations"] for b, told in training.items()}
        )
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
    for branch, told in row["branches"].items():
        gains = {"all": told["gcg"], "random": told["gcg_random"]}
        for name in (*SETS, "random"):
            share = f" ({100 * told['selected_fraction']:.0f} %)" if name == "selected" else ""
            first, gain = (branch, "") if name == "selected" else ("", _percent(gains[name]))
            view.add_row(first, name + share, _number(told["coherence"][name]), _number(told["signal"][name]), gain)
    return view


def _conflict(row: dict[str, Any]) -> Table:
    view = _view(
        "Recovery's gradient against review's",
        ("answers", "dot product", "cosine", "survives, %"),
        "survives: |g + d| / (|g| + |d|), what a mixed step keeps of both lengths",
    )
    for name in SETS:
        told = row["conflict"][name]
        view.add_row(name, _number(told["dot"]), _number(told["cosine"]), _percent(told["survives"]))
    view.add_section()
    for group, cosine in row["layers"].items():
        view.add_row(f"all, {group}", _number(row["layer_dots"][group]), _number(cosine), "")
    return view


def _correlations(title: str, found: dict[str, dict[str, Interval]]) -> Table:
    view = _view(title, ("", *found), "Spearman, with 95 % confidence intervals")
    names = list(dict.fromkeys(name for of_branch in found.values() for name in of_branch))
    for name in names[: 5 + SHOWN_SOURCES]:
        view.add_row(name.replace("_", " "), *(_interval(of_branch.get(name)) for of_branch in found.values()))
    return view


def _training(training: dict[str, Any]) -> Table:
    """Lengths and repeats over a run."""
    view = _view("What was selected over the run", ("", *training))

    def add(title: str, value) -> None:
        view.add_row(title, *(value(told) for told in training.values()))

    add("length of the selected, tokens", lambda t: _interval(t["lengths"].get("selected")))
    add("length of all", lambda t: _interval(t["lengths"].get("all")))
    add("difference within a step", lambda t: _interval(t["lengths"].get("difference")))
    add("prompts asked", lambda t: str(t["repeats"]["prompts"]))
    add("times asked, mean", lambda t: _number(t["repeats"]["asked"]))
    add("times selected, mean", lambda t: _number(t["repeats"]["selected"]))
    add("asked again: never selected, %", lambda t: _percent(t["repeats"]["never"]))
    add("asked again: always selected, %", lambda t: _percent(t["repeats"]["always"]))
    add("again, if it was the time before", lambda t: _interval(t["repeats"]["again"]))
    add("again, if it was not", lambda t: _interval(t["repeats"]["anew"]))
    sources = dict.fromkeys(name for told in training.values() for name in told.get("by_source", {}))
    for name in list(sources)[:SHOWN_SOURCES]:
        add(f"selected of source {name}", lambda t, name=name: _interval(t.get("by_source", {}).get(name)))
    return view


def _interval(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ({value[1]:.2f}, {value[2]:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"
