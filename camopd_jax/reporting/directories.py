"""Reads directories: runs alone and grids of them, finished or still in progress."""

import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from camopd_jax.analysis import study
from camopd_jax.config.identity import stored
from camopd_jax.config.methods import AGAINST, CONTROLS, INTERPOLATION, method_of
from camopd_jax.errors import UserError
from camopd_jax.reporting.runs import Group, Row, Run, Source, final
from camopd_jax.runtime.jsonl import read_rows


def read(folders: Sequence[str]) -> list[Source]:
    """The runs and grids of some directories, in their order.

    Raises:
      UserError: for a directory that is not there, and for one that holds no run.
    """
    paths = [epath.Path(folder) for folder in dict.fromkeys(folder.rstrip("/") or "/" for folder in folders)]
    names = _short_names(paths)
    sources = []
    for path, name in zip(paths, names, strict=True):
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; give the --workdir of a run or of a grid")
        if (path / "config.json").exists():
            run = _run(path)
            method = method_of(run.config) if "method" in run.config else None
            sources.append(Source(path, [Group(name, method, "", {run.config["seed"]: run})], 1, int(run.ended)))
        elif files := sorted(path.glob("*/*/seed-*/config.json")):
            sources.append(_grid(path, [file.parent for file in files], f"{name}: " if len(paths) > 1 else ""))
        else:
            raise UserError(f"{path}: holds no run; give the --workdir of `train`, `sft` or `compare`")
    return sources


def _short_names(paths: Sequence[epath.Path]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _run(folder: epath.Path, teachers: Sequence[Row] = ()) -> Run:
    """A run. `teachers`: rows of eval.jsonl to take its teachers' scores from where its own has none."""
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("metrics", "samples", "selection", "diagnostics")}
    evaluations = read_rows(folder / "eval.jsonl")
    have = {row["model"] for row in evaluations}
    evaluations += [row for row in teachers if row["model"] not in have]
    _, config = stored(folder / "config.json")
    return Run(folder, config, evaluations=evaluations, exported=(folder / "export").exists(), **rows)


# ------------------------------------------------------------------------------------ a grid


def _grid(path: epath.Path, folders: Sequence[epath.Path], prefix: str) -> Source:
    """The runs of WORKDIR/METHOD/SETTING/seed-N; those of the sweep are read only while it goes on."""
    found = _study(path / "study.json")
    teachers = read_rows(path / "teachers" / "eval.jsonl")
    runs: dict[tuple[str, float], dict[int, Run]] = {}
    for folder in folders:
        method, setting, seed = folder.parts[-3], float(folder.parts[-2]), int(folder.name.removeprefix("seed-"))
        if method not in (*CONTROLS, INTERPOLATION):
            continue  # another version's
        if seed != study.TUNING_SEED or method == INTERPOLATION or found is None:
            runs.setdefault((method, setting), {})[seed] = _run(folder, teachers)

    settings = {method: float(setting) for method, setting in found["settings"].items()} if found else {}
    seeds = sorted({seed for of_seeds in runs.values() for seed in of_seeds} - {study.TUNING_SEED})
    groups = []
    for (method, setting), of_seeds in runs.items():
        results = {seed: run for seed, run in sorted(of_seeds.items()) if seed != study.TUNING_SEED}
        if method == INTERPOLATION:
            if setting == settings.get(method):
                of_all = dict.fromkeys(seeds, next(iter(of_seeds.values()))) or of_seeds
                groups.append(Group(prefix + method, method, str(path), of_all, setting))
        elif results:
            groups.append(Group(prefix + method, method, str(path), results, setting))
    merits = found["merits"] if found else _merits(runs)
    if found is None:
        groups += _tuning_groups(runs, merits, {group.method for group in groups}, str(path), prefix)
    order = [*CONTROLS, INTERPOLATION]
    groups.sort(key=lambda group: (group.method not in AGAINST, order.index(group.method)))
    between = {setting: of_seeds[study.TUNING_SEED] for (method, setting), of_seeds in sorted(runs.items())
               if method == INTERPOLATION and study.TUNING_SEED in of_seeds}  # fmt: skip
    ended = sum(run.ended for of_seeds in runs.values() for run in of_seeds.values())
    if found:  # all are, but those that failed; the sweep's runs were not read
        ended = len(folders) - len(found.get("failed", {}))
    return Source(path, groups, len(folders), ended, found, merits, between)


def _tuning_groups(
    runs: dict[tuple[str, float], dict[int, Run]],
    merits: dict[str, dict[str, float]],
    others: set[str],
    origin: str,
    prefix: str,
) -> list[Group]:
    """Of each method without results yet, the best run of its sweep so far, or the one that is furthest."""
    best: dict[str, Group] = {}
    for (method, setting), of_seeds in runs.items():
        group = Group(prefix + method, method, origin, of_seeds, setting, tuning=True)

        def rank(group: Group) -> tuple[float, int]:
            return merits.get(group.method, {}).get(str(group.setting), -math.inf), group.run.steps

        if method not in others and method != INTERPOLATION:
            best[method] = max(best.get(method, group), group, key=rank)
    return list(best.values())


def _study(file: epath.Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); remove it and give the command of the grid again") from error


def _merits(runs: dict[tuple[str, float], dict[int, Run]]) -> dict[str, dict[str, float]]:
    """What the sweep of an unfinished grid has found so far, as study.json will tell it."""
    merits: dict[str, dict[str, float]] = {}
    for (method, setting), of_seeds in sorted(runs.items()):
        run = of_seeds.get(study.TUNING_SEED)
        if run and run.ended and (last := final(run)):
            axes = {row["benchmark"]: row["axis"] for row in last.student}
            merit = study.merit(study.shares(last.models, for_tuning=True), axes)
            merits.setdefault(method, {})[str(setting)] = merit
    return merits
