"""The same run under many methods and seeds: a grid of work directories, resumable, in worker processes."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import flags
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from camopd_jax.runtime.start import start
from camopd_jax.runtime import cli
from camopd_jax.analysis import study
from camopd_jax.config.schema import TrainConfig
from camopd_jax.config.methods import AGAINST, CONTROLS, INTERPOLATION, QUICK
from camopd_jax.errors import UserError
from camopd_jax.evals.results import Result
from camopd_jax.runs.evaluation import evaluate
from camopd_jax.runs.interpolation import interpolate
from camopd_jax.runtime.jsonl import read_rows, whole_file
from camopd_jax.config.identity import changed, different_fields, to_json
from camopd_jax.runs.training import train

METHODS = (*CONTROLS, INTERPOLATION)
WEIGHTS = tuple(i / 10 for i in range(1, 10))  # of the original model, in the interpolation's sweep


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    method: str
    setting: float  # learning rate; of the interpolation, the original model's weight
    seed: int

    def folder(self, workdir: str) -> Path:
        return Path(workdir) / self.method / f"{self.setting:g}" / f"seed-{self.seed}"

    def config(self, base: TrainConfig) -> TrainConfig:
        if self.method == INTERPOLATION:
            return base
        rate = {"optimizer.learning_rate": self.setting, "seed": self.seed}
        return changed(base, {**rate, **CONTROLS[self.method].changes, "evaluation.every": 0, "log.report": False})


# ------------------------------------------------------------------------------------ the grid


def compare(base: TrainConfig, workdir: str, methods: Sequence[str], rates: Sequence[float], seeds: int, workers: int):
    """Runs what is open of the grid. Returns outcomes by method and seed, the setting of each, and what failed."""
    if not base.evaluation.benchmarks:
        raise UserError("config.evaluation.benchmarks: there is none to compare by; name at least one")
    started = time.perf_counter()
    Path(workdir).mkdir(parents=True, exist_ok=True)
    with Workers(workers) as pool, Grid(pool, base, workdir) as grid:
        grid.baselines()
        tried = {method: WEIGHTS if method == INTERPOLATION else tuple(rates) for method in methods}
        sweep = [Run(method, setting, study.TUNING_SEED) for method in methods for setting in tried[method]
                 if len(tried[method]) > 1]  # fmt: skip
        found = grid.run(sweep, f"choosing among {len(rates)} rates" if len(rates) > 1 else "interpolation")
        axes = {b.name: b.axis for b in base.evaluation.benchmarks}
        chosen, merits = {}, {}
        for method in methods:
            merits[method] = {
                run.setting: study.merit(grid.shares(run, for_tuning=True), axes)
                for run in sweep if run.method == method and run in found
            }  # fmt: skip
            chosen[method] = max(merits[method], key=merits[method].get) if merits[method] else tried[method][0]
        runs = [Run(method, chosen[method], seed) for method in methods if method != INTERPOLATION
                for seed in range(seeds)]  # fmt: skip
        done = grid.run(runs, f"{len(methods)} methods, {seeds} seeds")
        outcomes = {method: {} for method in methods}
        for run in sorted(done, key=lambda run: run.seed):
            outcomes[run.method][run.seed] = grid.shares(run, for_tuning=False)
        if INTERPOLATION in methods:  # the same model whatever the seed
            between = grid.shares(Run(INTERPOLATION, chosen[INTERPOLATION], study.TUNING_SEED), for_tuning=False)
            outcomes[INTERPOLATION] = dict.fromkeys(range(seeds), between)
        seconds = time.perf_counter() - started
        facts = {"axes": axes, "settings": chosen, "merits": merits, "outcomes": outcomes, "failed": grid.failed,
                 "tokens": {f"{run.method}/{run.seed}": grid.tokens(run) for run in done},
                 "seconds": round(seconds), "workers": workers}  # fmt: skip
    with whole_file(Path(workdir) / "study.json") as file:
        file.write(json.dumps(facts, indent=1) + "\n")
    return facts


class Grid:
    """Runs cells of the grid in workers and shows how far it is."""

    def __init__(self, pool: concurrent.futures.Executor, base: TrainConfig, workdir: str):
        self.pool, self.base, self.workdir = pool, base, workdir
        self.failed: dict[str, str] = {}
        self._teachers: list[list[Result]] = []

    def __enter__(self) -> "Grid":
        console = Console(highlight=False)
        self._plain = None if console.is_terminal else console
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                             TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[last]}"),
                             console=console, disable=self._plain is not None)  # fmt: skip
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def baselines(self) -> None:
        """The two teachers' scores; every run starts with a copy of their answers."""
        folder = str(Path(self.workdir) / "teachers")
        self.pool.submit(_score_teachers, self.base, folder).result()
        rows = {(row["model"], row["benchmark"]): row for row in read_rows(epath.Path(folder) / "eval.jsonl")}
        names = [b.name for b in self.base.evaluation.benchmarks]
        self._teachers = [[rows[model, name] for name in names] for model in ("general", "specialised")]

    def run(self, runs: Sequence[Run], title: str) -> list[Run]:
        """Those of `runs` that came to their end, now or earlier."""
        done = [run for run in runs if finished(run, self.base, self.workdir)]
        task = self._bar.add_task(title, total=len(runs), completed=len(done), last="")
        if self._plain and runs:
            self._plain.print(f"{title}: {len(done)} of {len(runs)} runs are there")
        waiting = {
            self.pool.submit(_run, run, self.base, self.workdir): run for run in runs if run not in done
        }  # fmt: skip
        for future in concurrent.futures.as_completed(waiting):
            run = waiting[future]
            try:
                seconds = future.result()
            except UserError as error:
                self.failed[str(run.folder(self.workdir))] = str(error)
                told = f"{run.method} {run.setting:g} seed {run.seed}: {error}"
            else:
                done.append(run)
                told = f"{run.method} {run.setting:g} seed {run.seed}: {seconds:.0f} s"
            self._bar.update(task, completed=len(done) + len(self.failed), last=told)
            if self._plain:
                self._plain.print(f"{title}: {len(done)} of {len(runs)}, {told}")
        return done

    def shares(self, run: Run, for_tuning: bool) -> study.Shares:
        student = student_rows(run, self.base, self.workdir)
        return study.shares([*self._teachers, student], for_tuning)

    def tokens(self, run: Run) -> int:
        """Answer tokens sampled over a whole run."""
        return sum(row["response_tokens"] for row in read_rows(epath.Path(run.folder(self.workdir)) / "metrics.jsonl"))


def student_rows(run: Run, base: TrainConfig, workdir: str) -> list[Result]:
    """The finished model's results, one a benchmark; fewer if the run has not come to its end."""
    rows = read_rows(epath.Path(run.folder(workdir)) / "eval.jsonl")
    last = 0 if run.method == INTERPOLATION else base.steps
    found = {row["benchmark"]: row for row in rows
             if row["model"] not in ("general", "specialised") and row["step"] == last}  # fmt: skip
    return [found[b.name] for b in base.evaluation.benchmarks if b.name in found]


def finished(run: Run, base: TrainConfig, workdir: str) -> bool:
    """Whether a run has its results, and is one of this grid.

    Raises:
      UserError: if its folder holds a run of another config.
    """
    file = run.folder(workdir) / "config.json"
    if not file.exists():
        return False
    before, now = json.loads(file.read_text())["config"], to_json(run.config(base))
    if names := different_fields(before, now):
        raise UserError(f"{run.folder(workdir)}: made with another {names[0]}; give the old value, or a new --workdir")
    return len(student_rows(run, base, workdir)) == len(base.evaluation.benchmarks)


# ---------------------------------------------------------------------------------- in a worker


def default_workers() -> int:
    """One a core, or one for an accelerator; which of the two, a process finds out that then gives it back."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        if pool.submit(jax.default_backend).result() != "cpu":
            return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(concurrent.futures.ProcessPoolExecutor):
    """Processes that run one cell at a time, on a CPU each with a core of its own."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        cores = context.Queue()
        for core in _cores(count):
            cores.put(core)
        super().__init__(count, mp_context=context, initializer=_begin, initargs=(cores,))

    def __exit__(self, kind, *_) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)


def _cores(count: int) -> Iterable[list[int] | None]:
    """The cores of each worker; None leaves them as they are, where the system cannot tell."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * count
    own = sorted(os.sched_getaffinity(0))
    return [own[i::count] or own for i in range(count)]


def _begin(cores: multiprocessing.Queue) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    mine = cores.get()
    if mine is not None:
        os.sched_setaffinity(0, mine)  # before XLA counts its threads
    start()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # every run compiles the same small programs


def _end_with_parent() -> None:
    """A command that was killed leaves no worker behind that goes on writing where the next one's write."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _score_teachers(base: TrainConfig, folder: str) -> None:
    with _told_to(Path(folder)):
        evaluate(base, [], folder)


def _run(run: Run, base: TrainConfig, workdir: str) -> float:
    """Runs or continues a cell; returns its seconds."""
    started, folder = time.perf_counter(), run.folder(workdir)
    config = run.config(base)
    if not base.evaluation.answers:
        shutil.copytree(Path(workdir) / "teachers" / "answers", folder / "answers", dirs_exist_ok=True)
    with _told_to(folder):
        if run.method == INTERPOLATION:
            if not (folder / "export").exists():
                interpolate(config, run.setting, str(folder / "export"))
            evaluate(config, [str(folder / "export")], str(folder))
            stored = {"kind": "TrainConfig", "config": to_json(config)}
            (folder / "config.json").write_text(json.dumps(stored))
        else:
            train(config, str(folder))
    jax.clear_caches()  # hundreds of runs must not fill the memory with their programs
    return time.perf_counter() - started


@contextlib.contextmanager
def _told_to(folder: Path):
    """What is printed goes to the folder's log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield
