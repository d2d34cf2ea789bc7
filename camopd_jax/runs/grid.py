"""Runs a grid of methods, settings and seeds. Each cell has a work directory and runs in a worker process.

A cell with results is not run again, so the same command continues an interrupted grid.
"""

import concurrent.futures
import contextlib
import functools
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from camopd_jax.analysis import study
from camopd_jax.config.identity import changed, different_fields, read_stored, to_json, with_new_fields
from camopd_jax.config.methods import INTERPOLATION, changes_of
from camopd_jax.config.schema import AUTO, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.evals.results import Result
from camopd_jax.runs.evaluation import evaluate
from camopd_jax.runs.interpolation import interpolate
from camopd_jax.runs.training import train
from camopd_jax.runs.workers import WorkerPool
from camopd_jax.runtime.jsonl import atomic_file, read_rows

WEIGHTS = tuple(i / 10 for i in range(1, 10))  # weights of the original model in the interpolations to try
TEACHERS = ("general", "specialised")  # their names in eval.jsonl


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    setting: float  # the learning rate; for the interpolation, the original model's weight
    seed: int

    def __str__(self) -> str:
        return f"{self.method} {self.setting:g} seed {self.seed}"

    def folder(self, workdir: str) -> Path:
        """The run's work directory."""
        return Path(workdir) / self.method / f"{self.setting:g}" / f"seed-{self.seed}"

    def config(self, base: TrainConfig) -> TrainConfig:
        """The grid's config with this method, setting and seed, and with an evaluation only at the end."""
        if self.method == INTERPOLATION:
            return base
        own = {"optimizer.learning_rate": self.setting, "seed": self.seed}
        always = {"evaluation.every": 0, "log.report": False}
        return cast(TrainConfig, changed(base, own | changes_of(self.method, base) | always))


# ------------------------------------------------------------------------------------ the study


def compare(
    base: TrainConfig, workdir: str, methods: Sequence[str], rates: Sequence[float], seeds: int, workers: int
) -> dict[str, Any]:
    """Runs the unfinished cells of a grid and writes study.json.

    A method with several settings is first run with each of them on a separate seed. All other seeds then use the best
    setting.

    Args:
      rates: learning rates to choose from.
      workers: number of runs at a time.

    Returns:
      The contents of study.json: outcomes by method and seed, the setting of each method, failed runs, and more.

    Raises:
      UserError: if there are no benchmarks, or if a cell's folder has a run with another config.
    """
    if not base.evaluation.benchmarks:
        raise UserError("config.evaluation.benchmarks is empty, so there is nothing to compare; give at least one")
    if AUTO in (base.compute.remat, base.optimizer.micro_batch):
        raise UserError(
            f"config.compute.remat or config.optimizer.micro_batch is {AUTO!r}, which is chosen for one run that has a "
            "device for itself; give a name and a number"
        )
    started = time.perf_counter()
    axes: dict[str, str] = {benchmark.name: benchmark.axis for benchmark in base.evaluation.benchmarks}
    settings = {method: WEIGHTS if method == INTERPOLATION else tuple(rates) for method in methods}
    Path(workdir).mkdir(parents=True, exist_ok=True)
    with WorkerPool(workers) as pool, Grid(pool, base, workdir) as grid:
        grid.score_teachers()
        merits = _sweep(grid, settings, axes, title=_sweep_title(rates))
        chosen = {method: _best(merits[method], settings[method]) for method in methods}
        cells = [
            Cell(method, chosen[method], seed) for method in methods if method != INTERPOLATION for seed in range(seeds)
        ]
        done = grid.run(cells, f"{len(methods)} methods, {seeds} seeds")
        facts = {
            "axes": axes,
            "settings": chosen,
            "merits": merits,
            "outcomes": _outcomes(grid, chosen, done, seeds),
            "failed": grid.failed,
            "tokens": {f"{cell.method}/{cell.seed}": study.sampled_tokens(grid.metrics(cell)) for cell in done},
            "run_seconds": {f"{cell.method}/{cell.seed}": study.run_seconds(grid.metrics(cell)) for cell in done},
            "seconds": round(time.perf_counter() - started),
            "workers": workers,
        }
    with atomic_file(Path(workdir) / "study.json") as file:
        file.write(json.dumps(facts, indent=1) + "\n")
    return facts


def _sweep_title(rates: Sequence[float]) -> str:
    return f"choosing among {len(rates)} rates" if len(rates) > 1 else "interpolation"


def _sweep(
    grid: "Grid", settings: dict[str, tuple[float, ...]], axes: dict[str, str], title: str
) -> dict[str, dict[float, float]]:
    """The merit of each setting, by method and setting; empty for a method with a single setting."""
    cells = [
        Cell(method, setting, study.TUNING_SEED)
        for method, of_method in settings.items()
        if len(of_method) > 1
        for setting in of_method
    ]
    done = set(grid.run(cells, title))
    merits: dict[str, dict[float, float]] = {method: {} for method in settings}
    for cell in cells:
        if cell in done:
            merits[cell.method][cell.setting] = study.merit(grid.shares(cell, for_tuning=True), axes)
    return merits


def _best(merits: dict[float, float], settings: tuple[float, ...]) -> float:
    """The setting with the highest merit; the first setting if none was tried."""
    return max(merits, key=merits.__getitem__) if merits else settings[0]


def _outcomes(
    grid: "Grid", chosen: dict[str, float], done: Sequence[Cell], seeds: int
) -> dict[str, dict[int, study.Shares]]:
    """Recovery and retention by method and seed."""
    outcomes: dict[str, dict[int, study.Shares]] = {method: {} for method in chosen}
    for cell in sorted(done, key=lambda cell: cell.seed):
        outcomes[cell.method][cell.seed] = grid.shares(cell, for_tuning=False)
    if INTERPOLATION in chosen:  # the model does not depend on the seed
        cell = Cell(INTERPOLATION, chosen[INTERPOLATION], study.TUNING_SEED)
        outcomes[INTERPOLATION] = dict.fromkeys(range(seeds), grid.shares(cell, for_tuning=False))
    return outcomes


# ------------------------------------------------------------------------------------ the grid


class Grid:
    """Runs cells in worker processes, shows their progress, and reads their results."""

    def __init__(self, pool: concurrent.futures.Executor, base: TrainConfig, workdir: str) -> None:
        self.failed: dict[str, str] = {}  # reasons, by folder
        self._pool, self._base, self._workdir = pool, base, workdir
        self._teachers: list[list[Result]] = []
        self._console = Console(highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "Grid":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def score_teachers(self) -> None:
        """Evaluates the two teachers once; every run starts with a copy of their answers."""
        folder = str(Path(self._workdir) / "teachers")
        self._pool.submit(_score_teachers, self._base, folder).result()
        results = {(row["model"], row["benchmark"]): row for row in read_rows(epath.Path(folder) / "eval.jsonl")}
        names = [benchmark.name for benchmark in self._base.evaluation.benchmarks]
        self._teachers = [[results[model, name] for name in names] for model in TEACHERS]

    def run(self, cells: Sequence[Cell], title: str) -> list[Cell]:
        """Runs the unfinished cells. Returns all finished cells; the others are in `failed`."""
        done = [cell for cell in cells if is_finished(cell, self._base, self._workdir)]
        task = self._bar.add_task(title, total=len(cells), completed=len(done), last="")
        if cells:
            self._print_plain(f"{title}: {len(done)} of {len(cells)} runs are complete already")
        running = {
            self._pool.submit(_run_cell, cell, self._base, self._workdir): cell for cell in cells if cell not in done
        }
        for future in concurrent.futures.as_completed(running):
            cell = running[future]
            try:
                message = f"{cell}: {future.result():.0f} s"
                done.append(cell)
            except concurrent.futures.BrokenExecutor:
                raise
            except Exception as error:  # a run that fails, whatever the reason, leaves the others
                reason = str(error) if isinstance(error, UserError) else f"{_in_a_line(error)} (log.txt has more)"
                message = f"{cell}: {reason}"
                self.failed[str(cell.folder(self._workdir))] = reason
            self._bar.update(task, completed=len(done) + len(self.failed), last=message)
            self._print_plain(f"{title}: {len(done)} of {len(cells)}, {message}")
        return done

    def shares(self, cell: Cell, for_tuning: bool) -> study.Shares:
        """Recovery and retention of a finished run, on the questions for tuning or on the others."""
        student = student_results(cell, self._base, self._workdir)
        return study.shares([*self._teachers, student], for_tuning)

    def metrics(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of a run's metrics.jsonl, one a step."""
        return read_rows(epath.Path(cell.folder(self._workdir)) / "metrics.jsonl")

    def _print_plain(self, line: str) -> None:
        """Prints a line if there is no terminal for the progress bar."""
        if not self._console.is_terminal:
            self._console.print(line)


def _in_a_line(error: Exception) -> str:
    """An exception's class and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def student_results(cell: Cell, base: TrainConfig, workdir: str) -> list[Result]:
    """The results of a cell's final model, one for each benchmark; fewer if the run is not finished."""
    last = 0 if cell.method == INTERPOLATION else base.steps
    rows = read_rows(epath.Path(cell.folder(workdir)) / "eval.jsonl")
    results = {row["benchmark"]: row for row in rows if row["model"] not in TEACHERS and row["step"] == last}
    names = [benchmark.name for benchmark in base.evaluation.benchmarks]
    return [results[name] for name in names if name in results]


def is_finished(cell: Cell, base: TrainConfig, workdir: str) -> bool:
    """Whether a cell has all its results.

    Raises:
      UserError: if its folder has a run with another config.
    """
    file = cell.folder(workdir) / "config.json"
    if not file.exists():
        return False
    kind, before = read_stored(epath.Path(file))
    if names := different_fields(with_new_fields(kind, before), to_json(cell.config(base))):
        raise UserError(f"{cell.folder(workdir)}: made with another {names[0]}; give the old value, or a new --workdir")
    return len(student_results(cell, base, workdir)) == len(base.evaluation.benchmarks)


# ---------------------------------------------------------------------------------- in a worker


def _score_teachers(base: TrainConfig, folder: str) -> None:
    with _output_to_log(Path(folder)):
        evaluate(base, [], folder)


@functools.lru_cache(1)
def keep_programs_of(method: str) -> None:
    """Frees compiled programs when the method changes: those of hundreds of runs would fill the memory."""
    jax.clear_caches()


def _run_cell(cell: Cell, base: TrainConfig, workdir: str) -> float:
    """Runs or resumes a cell; returns the seconds it took."""
    started, folder = time.perf_counter(), cell.folder(workdir)
    config = cell.config(base)
    keep_programs_of(cell.method)
    if not base.evaluation.answers:
        shutil.copytree(Path(workdir) / "teachers" / "answers", folder / "answers", dirs_exist_ok=True)
    with _output_to_log(folder):
        if cell.method == INTERPOLATION:
            _interpolate(config, cell.setting, folder)
        else:
            train(config, str(folder))
    return time.perf_counter() - started


def _interpolate(config: TrainConfig, weight: float, folder: Path) -> None:
    """Writes and evaluates an interpolated model, in a folder like a run's work directory."""
    if not (folder / "export").exists():
        interpolate(config, weight, str(folder / "export"))
    evaluate(config, [str(folder / "export")], str(folder))
    (folder / "config.json").write_text(json.dumps({"kind": "TrainConfig", "config": to_json(config)}))


@contextlib.contextmanager
def _output_to_log(folder: Path) -> Iterator[None]:
    """Redirects stdout and stderr to log.txt in the folder. An unexpected error is written there too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        except UserError:
            raise
        except Exception:
            traceback.print_exc()
            raise
