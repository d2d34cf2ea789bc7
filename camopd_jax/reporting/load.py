"""Reads the directories of single runs and grids, finished or in progress."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from camopd_jax.analysis import study
from camopd_jax.config.identity import read_stored
from camopd_jax.config.methods import INTERPOLATION, METHOD_NAMES, method_of
from camopd_jax.errors import UserError
from camopd_jax.reporting.runs import Directory, FileRow, Group, LoadedRun
from camopd_jax.runtime.jsonl import read_rows

Cells = dict[tuple[str, float], dict[int, LoadedRun]]  # by method and setting, then by seed


def read(folders: Sequence[str]) -> list[Directory]:
    """Reads directories of runs and grids; the order is kept.

    Raises:
      UserError: for a directory that does not exist or has no run.
    """
    paths = [epath.Path(folder) for folder in dict.fromkeys(folder.rstrip("/") or "/" for folder in folders)]
    names = [path.name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_directory(path, name, len(paths) > 1) for path, name in zip(paths, names, strict=True)]


def _directory(path: epath.Path, name: str, one_of_several: bool) -> Directory:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the --workdir of a run or of a grid")
    if (path / "config.json").exists():
        run = _run(path)
        state = f"a run, {'ended' if run.ended else 'in progress'}, {run.steps} of {run.config['steps']} steps"
        return Directory(path, state, [Group(name, _method(run), "", {run.config["seed"]: run})])
    files = sorted(path.glob("*/*/seed-*/config.json"))
    if not files:
        raise UserError(f"{path}: holds no run; give the --workdir of `train`, `sft` or `compare`")
    return _grid(path, [file.parent for file in files], f"{name}: " if one_of_several else "")


def _method(run: LoadedRun) -> str | None:
    """The method's name; None for a config of another version or of supervised fine-tuning."""
    try:
        return method_of(run.config)
    except (KeyError, TypeError, AttributeError):
        return None


def _run(folder: epath.Path, teachers: Sequence[FileRow] = ()) -> LoadedRun:
    """Reads a run. `teachers`: rows of eval.jsonl with the teachers' results, used if the run has none."""
    _, config = read_stored(folder / "config.json")
    metrics, samples, selection, evaluations, diagnostics, trials = (
        read_rows(folder / f"{name}.jsonl")
        for name in ("metrics", "samples", "selection", "eval", "diagnostics", "start")
    )
    gap_masses = [_quantiles(row) for row in selection]
    exported = (folder / "export").exists()
    return LoadedRun(config, metrics, gap_masses, samples, [*teachers, *evaluations], diagnostics, trials, exported)


def _quantiles(row: FileRow) -> FileRow:
    """Quantiles of the gap mass ("score") in a row of selection.jsonl."""
    median, top = np.quantile([score for score in row["score"] if score is not None] or [math.nan], (0.5, 0.9)).tolist()
    return {"step": row["step"], "phase": row["phase"], "gap_mass_median": median, "gap_mass_top": top}


# ------------------------------------------------------------------------------------ a grid


def _grid(path: epath.Path, folders: Sequence[epath.Path], prefix: str) -> Directory:
    """Reads the runs in WORKDIR/METHOD/SETTING/seed-N. Tuning runs are read only while the grid is in progress."""
    facts = _read_study(path / "study.json")
    teachers = read_rows(path / "teachers" / "eval.jsonl")
    cells: Cells = {}
    for folder in folders:
        method, setting, seed = folder.parts[-3], folder.parts[-2], int(folder.name.removeprefix("seed-"))
        if method in METHOD_NAMES and (seed != study.TUNING_SEED or method == INTERPOLATION or not facts):
            cells.setdefault((method, float(setting)), {})[seed] = _run(folder, teachers)
    merits = facts["merits"] if facts else _merits(cells)

    groups, sweep, interpolation = [], [], []
    for (method, setting), of_seeds in sorted(cells.items()):
        own = {seed: run for seed, run in sorted(of_seeds.items()) if seed != study.TUNING_SEED}
        if method == INTERPOLATION:
            interpolation.append(Group(f"{100 * setting:.0f} % original", method, str(path), of_seeds, setting))
        elif own:
            groups.append(Group(prefix + method, method, str(path), own, setting))
        else:
            sweep.append(Group(f"{prefix}{method}, tuning", method, str(path), of_seeds, setting))
    # For a method without results: the tuning run with the best setting so far, or the one with the most steps.
    sweep.sort(
        key=lambda group: (merits.get(str(group.method), {}).get(str(group.setting), -math.inf), group.run.steps)
    )
    groups += {group.method: group for group in sweep if all(group.method != g.method for g in groups)}.values()
    weight = float(facts["settings"].get(INTERPOLATION, math.nan)) if facts else None
    seeds = sorted({seed for group in groups for seed in group.runs}) or [study.TUNING_SEED]
    for chosen in [group for group in interpolation if group.setting == weight]:  # repeated for every seed
        groups.append(Group(prefix + INTERPOLATION, INTERPOLATION, str(path), dict.fromkeys(seeds, chosen.run), weight))
    groups.sort(key=lambda group: METHOD_NAMES.index(group.method))

    if facts:
        time = f"the last start took {facts['seconds'] / 60:.0f} minutes" if "seconds" in facts else ""
        failed = f"{len(facts['failed'])} failed" if facts.get("failed") else ""
        state = ", ".join(filter(None, ["a grid, ended", f"{len(folders)} runs", failed, time]))
    else:
        ended = sum(run.ended for of_seeds in cells.values() for run in of_seeds.values())
        state = f"a grid, in progress, {len(folders)} runs so far, {ended} of them ended"
    return Directory(path, state, groups, facts, merits, interpolation)


def _read_study(file: epath.Path) -> dict[str, Any]:
    """The contents of study.json; empty while the grid is in progress."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); delete it and run the grid's command again") from error


def _merits(cells: Cells) -> dict[str, dict[str, float]]:
    """The merits so far of an unfinished grid, in the form of study.json."""
    merits: dict[str, dict[str, float]] = {}
    for (method, setting), of_seeds in sorted(cells.items()):
        run = of_seeds.get(study.TUNING_SEED)
        if run and run.ended and run.final:
            axes = {row["benchmark"]: row["axis"] for row in run.final[1][-1]}
            merits.setdefault(method, {})[str(setting)] = study.merit(study.shares(run.final[1], True), axes)
    return merits
