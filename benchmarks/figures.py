"""The figures of docs/results.md on studies.

    python benchmarks/figures.py --study=runs/sandbox --diagnosed=runs/diagnosed
    python benchmarks/figures.py --study=runs/objectives --prefix=objectives_

--study is a finished grid of camopd_jax.compare; --diagnosed one whose runs have a diagnostics.jsonl (several seeds of
camopd and vanilla). Writes docs/figures/PREFIX{methods,differences,gradients}.svg, the last for --diagnosed. Needs
matplotlib: pip install '.[bench]'.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags
from etils import epath

from camopd_jax.analysis import study
from camopd_jax.runtime.jsonl import read_rows

matplotlib.use("svg")
import matplotlib.pyplot as plt

flags.DEFINE_string("study", None, "Work directory of a finished grid.", required=True)
flags.DEFINE_string("diagnosed", None, "Work directory of a grid with diagnostics; none: no figure of gradients.")
flags.DEFINE_string("prefix", "", "Begins the names of the files.")
flags.DEFINE_string("out", str(Path(__file__).parents[1] / "docs" / "figures"), "Folder of the figures.")

INK, FAINT, COLOURS = "#222222", "#9a9a9a", {"camopd": "#2f6f2f", "vanilla": "#c02f5b"}
BRANCHES = {"recovery": "#2a64b8", "review": "#c2570c"}


def axis_values(found: dict, method: str, axis: str) -> dict[int, float]:
    """Of each seed the mean share over an axis's benchmarks, in %."""
    names = [name for name, of in found["axes"].items() if of == axis]
    return {int(seed): 100 * float(np.mean([of_seed[name] for name in names]))
            for seed, of_seed in found["outcomes"][method].items()}  # fmt: skip


def methods(found: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9, 6.5))
    points = {"specialised": (0.0, 100.0)}
    for method in sorted(found["outcomes"], key=lambda method: method not in COLOURS):
        back, kept = (study.mean(axis_values(found, method, axis).values()) for axis in ("general", "domain"))
        colour = COLOURS.get(method, FAINT)
        axes.errorbar(back.value, kept.value, xerr=back.error, yerr=kept.error, fmt="o", ms=5 if colour == FAINT else 8,
                      color=colour, elinewidth=0.8, alpha=0.7, zorder=2 + (colour != FAINT))  # fmt: skip
        points[method] = back.value, kept.value
    axes.plot(*points["specialised"], "o", mfc="none", color=INK)
    axes.set_xlabel("general skills: share of the loss that came back, %")
    axes.set_ylabel("domain: share that was kept, %")
    _name(axes, points)
    return figure


def _name(axes: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names beside points, each where it covers no other; where there is no place, none."""
    axes.figure.canvas.draw()
    taken = []
    around = [(r * x, r * y) for r in (1, 1.6) for x, y in
              ((8, 5), (8, -9), (-8, 5), (-8, -9), (0, 12), (0, -16))]  # fmt: skip
    for name, point in points.items():
        for offset in around:
            side = "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
            label = axes.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=7.5, ha=side,
                                  color=COLOURS.get(name, INK))  # fmt: skip
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def differences(found: dict) -> plt.Figure:
    """Each method less vanilla, seed by seed, with 95 % t intervals."""
    others = [method for method in found["outcomes"] if method != "vanilla"]
    figure, pair = plt.subplots(1, 2, figsize=(9, 0.24 * len(others) + 1.2), sharey=True)
    for axes, (axis, title) in zip(pair, {"general": "came back", "domain": "kept"}.items(), strict=True):
        theirs = axis_values(found, "vanilla", axis)
        for row, method in enumerate(reversed(others)):
            apart = study.difference(axis_values(found, method, axis), theirs)
            reach = study.half_width(apart.error, len(theirs))
            colour = COLOURS.get(method, INK)
            axes.errorbar(apart.value, row, xerr=reach, fmt="o", ms=4, color=colour, elinewidth=1)
        axes.axvline(0, color=COLOURS["vanilla"], lw=1)
        axes.set_yticks(range(len(others)), reversed(others), fontsize=8)
        axes.set_xlabel(f"{title}: less that of vanilla, points")
    return figure


def gradients(folder: Path) -> plt.Figure:
    """Means over seeds of what the diagnostics of camopd and vanilla say."""
    figure, (gains, conflict) = plt.subplots(1, 2, figsize=(9, 3.6))
    for branch, colour in BRANCHES.items():
        for key, style, over in (("gcg", "-", "all"), ("gcg_random", ":", "as many drawn by lot")):
            steps, mean, error = over_steps(folder, "camopd", lambda row, b=branch, k=key: row["branches"][b][k])
            gains.plot(steps, 100 * mean, style, color=colour, label=f"{branch}, over {over}")
            gains.fill_between(steps, 100 * (mean - error), 100 * (mean + error), color=colour, alpha=0.12, lw=0)
    gains.axhline(0, color=INK, lw=0.8)
    gains.set_ylabel("gain in coherence by selection, %")
    gains.legend(fontsize=7, frameon=False)
    for method, colour in COLOURS.items():
        steps, mean, error = over_steps(folder, method, lambda row: row["conflict"]["all"]["cosine"])
        conflict.plot(steps, mean, color=colour, label=method)
        conflict.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    conflict.axhline(0, color=INK, lw=0.8)
    conflict.set_ylabel("cosine of recovery's and review's gradient")
    conflict.legend(fontsize=8, frameon=False)
    for axes in (gains, conflict):
        axes.set_xlabel("step")
    return figure


def over_steps(folder: Path, method: str, value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which every seed has a value, its mean and its standard error over seeds."""
    runs = [read_rows(file) for file in sorted(epath.Path(folder).glob(f"{method}/*/seed-*/diagnostics.jsonl"))]
    of_step = {rows[0]["step"]: [value(row) for row in rows] for rows in zip(*runs, strict=True)}
    of_step = {step: values for step, values in of_step.items() if None not in values}
    table = np.asarray(list(of_step.values()))
    return np.asarray(list(of_step)), table.mean(1), table.std(1, ddof=1) / np.sqrt(table.shape[1])


def main(_) -> None:
    values = flags.FLAGS
    found = json.loads((Path(values.study) / "study.json").read_text())
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2,
                         "svg.hashsalt": "camopd_jax", "font.size": 9})  # fmt: skip
    drawn = {"methods": methods(found), "differences": differences(found)}
    if values.diagnosed:
        drawn["gradients"] = gradients(Path(values.diagnosed))
    for name, figure in drawn.items():
        figure.tight_layout()
        figure.savefig(Path(values.out) / f"{values.prefix}{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    app.run(main)
