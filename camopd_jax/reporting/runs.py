"""Reads what a report is made of: runs alone and grids of them, finished or still in progress."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from camopd_jax.analysis import study
from camopd_jax.controls import AGAINST, CONTROLS, INTERPOLATION, method_of
from camopd_jax.errors import UserError
from camopd_jax.evals import report
from camopd_jax.evals.report import Result, Standing
from camopd_jax.jsonl import read_rows
from camopd_jax.resolved import stored

Row = dict[str, Any]
TEACHERS = ("general", "specialised")


@dataclass(frozen=True)
class Run:
    """A run's work directory. Lists are empty where it has no such file."""

    folder: epath.Path
    config: dict[str, Any]
    metrics: list[Row]
    samples: list[Row]
    selection: list[Row]
    evaluations: list[Row]
    diagnostics: list[Row]
    exported: bool

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def ended(self) -> bool:
        last = final(self)
        return self.exported or (last is not None and last.step == self.steps == self.config["steps"])

    @property
    def tokens(self) -> int:
        """Answer tokens sampled so far."""
        return sum(row.get("response_tokens") or 0 for row in self.metrics)


@dataclass(frozen=True)
class Final:
    """A student's last scores beside its two teachers', on the same questions, benchmark by benchmark."""

    step: int
    general: list[Result]
    specialised: list[Result]
    student: list[Result]

    @property
    def models(self) -> tuple[list[Result], list[Result], list[Result]]:
        return self.general, self.specialised, self.student

    @property
    def questions(self) -> int:
        return sum(row["n"] for row in self.student)

    def without_tuning(self) -> "Final":
        """On the questions that did not choose a setting."""
        kept = [[report.some(row, [i for i in range(row["n"]) if not study.tuning(i)]) for row in rows]
                for rows in self.models]  # fmt: skip
        return Final(self.step, *kept)


@dataclass(frozen=True)
class Group:
    """What is one line of a figure: a run alone, or a grid's runs of one method at one setting, by seed."""

    name: str
    method: str | None  # of controls.py
    origin: str  # the grid's folder; "" of a run alone
    runs: dict[int, Run]
    setting: float | None = None  # a learning rate; of the interpolation, the original model's weight
    tuning: bool = False  # a run that chooses a learning rate, shown while there are no others

    @property
    def run(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def distinct(self) -> list[Run]:
        """Its runs, each once: the interpolation is the same model whatever the seed."""
        return list({id(run): run for run in self.runs.values()}.values())


@dataclass(frozen=True)
class Source:
    """What one of the given directories holds."""

    folder: epath.Path
    groups: list[Group]
    found: int  # runs, tuning runs among them
    ended: int
    study: dict[str, Any] | None = None  # of a finished grid
    merits: dict[str, dict[str, float]] = field(default_factory=dict)  # by method and learning rate
    between: dict[float, Run] = field(default_factory=dict)  # the interpolation, by the original model's weight

    @property
    def is_grid(self) -> bool:
        return bool(self.groups and self.groups[0].origin)


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
    ended = len(folders) if found else sum(run.ended for of_seeds in runs.values() for run in of_seeds.values())
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


# ---------------------------------------------------------------------------------- its scores


def final(run: Run) -> Final | None:
    """The scores of the model that a run ended with, or of its last evaluation; None without, or without teachers'."""
    names = [benchmark["name"] for benchmark in run.config["evaluation"]["benchmarks"]]
    rows = [row for row in run.evaluations if row["benchmark"] in names]
    teachers = [{row["benchmark"]: row for row in rows if row["model"] == teacher} for teacher in TEACHERS]
    asked = _whole_evaluations([row for row in rows if row["model"] not in TEACHERS], names)
    if not asked or any(len(of_teacher) < len(names) for of_teacher in teachers):
        return None
    step, of_student = next(((step, found) for step, found in reversed(asked) if step == _best(run)), asked[-1])
    student = [of_student[name] for name in names]
    before = [[report.some(of[row["benchmark"]], range(row["n"])) for row in student] for of in teachers]
    return Final(step, *before, student)


def _whole_evaluations(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[int, dict[str, Row]]]:
    """Evaluations of a student that have every benchmark, in the order in which they ended."""
    whole, current, step = [], {}, None
    for row in rows:
        if row["step"] != step or row["benchmark"] in current:
            current, step = {}, row["step"]
        current[row["benchmark"]] = row
        if len(current) == len(names):
            whole.append((step, current))
    return whole


def _best(run: Run) -> int | None:
    """The step whose model was exported, where that is not the last."""
    rows = standings(run)
    if not run.exported or not rows or run.config["checkpoints"]["export"] != "best":
        return None
    return max(rows, key=lambda row: (Standing(row["keeps"], row["merit"]), row["step"]))["step"]


def standings(run: Run) -> list[Row]:
    """The rows of eval.jsonl that tell how the student stood between the steps."""
    return [row for row in run.evaluations if row["benchmark"] == "standing"]
