"""A run in its work directory: everything that `train` and `sft` share around their steps."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from etils import epath
from jax.experimental import multihost_utils

from camopd_jax.config.identity import fingerprint, to_json
from camopd_jax.config.schema import Config
from camopd_jax.errors import UserError
from camopd_jax.evals import runner
from camopd_jax.evals.comparison import Rank, out_of_patience, rank_row
from camopd_jax.evals.results import AXES, Result, axis_mean
from camopd_jax.inference.loading import Loaded
from camopd_jax.models import partition
from camopd_jax.runs.card import RunRecord, read_record
from camopd_jax.runs.checkpoint import CheckpointStore, DamagedCheckpoint
from camopd_jax.runs.export import write_folder
from camopd_jax.runs.lock import lock
from camopd_jax.runs.workdir import claim_workdir
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import barrier, broadcast, is_distributed, is_primary, run_on_all
from camopd_jax.runtime.jsonl import drop_rows_after, read_rows
from camopd_jax.runtime.metrics import MetricsWriter
from camopd_jax.runtime.progress import work
from camopd_jax.runtime.trackers import Trackers, open_trackers
from camopd_jax.types import TrainState

# Files with rows for each step. A run resumed after n steps keeps the rows of the first n plus this many steps: the
# diagnostics of step n are written before the step.
KEPT_ROWS = {"metrics.jsonl": 0, "samples.jsonl": 0, "selection.jsonl": 0, "diagnostics.jsonl": 1}


class ResumableStream(Protocol):
    """A data stream whose position is saved in checkpoints."""

    digest: str  # of its rows

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Run:
    """Claims a work directory, restores its last checkpoint, writes metrics, saves, evaluates and exports.

    Call `restore`, then for every step `record`, and `pause` if `pauses_after` returns True; then `state_to_export` and
    `finish`.
    """

    writer: MetricsWriter  # `restore` sets these
    display: Display
    student: Loaded
    streams: Mapping[str, ResumableStream]
    provenance: dict[str, str]

    def __init__(self, config: Config, workdir: str) -> None:
        """Claims the work directory.

        Raises:
          UserError: if the work directory belongs to a run with another config.
        """
        self.config = config
        self.workdir = epath.Path(workdir)
        self.terminated = False  # whether this process got a signal to end
        self._printed: set[str] = set()  # lines of evaluations
        self._skipped: dict[str, int] = {}  # consecutive skipped updates, by phase
        run_on_all(lambda: runner.check(config.evaluation))
        self._lock = run_on_all(lambda: lock(self.workdir) if is_primary() else None)
        claim_workdir(self.workdir, config)
        self.ranks = runner.broadcast_ranks(self.workdir)  # of the evaluated checkpoints, by step
        self.checkpoints = CheckpointStore(workdir, config.checkpoints, self.ranks)

    def restore(
        self,
        state: TrainState,
        student: Loaded,
        streams: Mapping[str, ResumableStream],
        provenance: dict[str, str],
    ) -> TrainState:
        """Restores the last checkpoint with the shardings of `state`; without a checkpoint, returns `state`.

        Args:
          student: the model to train, with its initial `params`.
          streams: the data streams by name.
          provenance: names and fingerprints of the run's models, for checkpoints and the model card.

        Raises:
          UserError: if the checkpoint cannot be read, or was made with other models or prompts.
        """
        self.student, self.streams = student, streams
        self.provenance = provenance | {"config_fingerprint": fingerprint(self.config)}
        digests = broadcast(lambda: {name: stream.digest for name, stream in streams.items()})
        run_on_all(lambda: _check_same_rows(streams, digests))
        damaged: list[str] = []
        while (last := self.checkpoints.latest()) is not None:
            try:
                with work(f"restoring step {last}"):
                    state, positions, provenance = self.checkpoints.restore(last, state)
            except DamagedCheckpoint as error:
                damaged.append(f"{error}; moved to {self.checkpoints.set_aside(last)}")
                continue
            self._check_provenance(provenance)
            for name, stream in self.streams.items():
                self._check_rows(name, stream, positions[name]["digest"])
                stream.set_state(positions[name]["position"])
            break
        if last is None and damaged:
            raise UserError(f"{damaged[-1]}. No checkpoint is left: give a new --workdir")
        steps_done = int(state.step)
        if last is not None:
            for row in read_rows(self.workdir / "metrics.jsonl"):
                if row["step"] < steps_done:
                    self._count_skipped(row["phase"], row["skipped"] > 0)
            barrier("metrics")  # process 0 now shortens the file
        if is_primary():
            for file, more in KEPT_ROWS.items():
                drop_rows_after(self.workdir / file, steps_done + more)
        self.display = Display(self.config.steps, steps_done)
        with work("opening the trackers"):
            self.writer = MetricsWriter(self.workdir, run_on_all(self._open_trackers))
        for text in damaged:
            self.display.print(f"warning: {text}")
        if last is not None:
            self.display.print(f"continuing from step {last}")
        if partition.frozen_routers(self.student.model.config, self.config.optimizer.trained):
            self.display.print("the routers of the experts are frozen; config.optimizer.trained='.' trains them too")
        for line in runner.notices(self.config.evaluation):
            self.display.print(line)
        if not is_distributed():  # with several processes, JAX handles the signal and informs the others
            signal.signal(signal.SIGTERM, self._terminate)
        return state

    def _open_trackers(self) -> Trackers | None:
        if not is_primary() or not self.config.log.trackers:
            return None
        names, values = self.config.log.trackers, to_json(self.config)
        opened = open_trackers(names, self.workdir, values, self.display.print)
        for name, address in opened.addresses.items():
            self.display.print(f"{name}: {address}")
        return opened

    def _check_provenance(self, provenance: dict[str, str]) -> None:
        for name, value in self.provenance.items():
            if provenance.get(name) != value:
                raise UserError(
                    f"{self.workdir}: its checkpoints were made with another {name} ({provenance.get(name)}, "
                    f"now {value}); give the old one, or a new --workdir"
                )

    def _check_rows(self, name: str, stream: ResumableStream, digest: str) -> None:
        if stream.digest != digest:
            raise UserError(
                f"{self.workdir}: its run began with other {name} prompts than its config names now (a file, a chat "
                "template or a tokenizer has changed); give the old ones, or a new --workdir"
            )

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    # ----------------------------------------------------------------- between the steps

    def record(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Writes a step's metrics and samples, and shows them.

        Raises:
          UserError: if too many updates in a row were not finite.
        """
        row["skipped"] = self._count_skipped(row["phase"], row["skipped"] > 0)
        self.writer.add_step(row)
        self.writer.add_samples(samples)
        self.display.step(row)
        if row["skipped"] >= self.config.max_skipped:
            self.writer.close()
            self.display.close()
            raise UserError(
                f"config.optimizer.learning_rate = {self.config.optimizer.learning_rate}: {row['skipped']} "
                f"{row['phase']} updates in a row, the last at step {row['step']}, had a loss or gradient that is not "
                "finite; lower it and give a new --workdir. Checkpoints are kept"
            )

    def _count_skipped(self, phase: str, skipped: bool) -> int:
        """How many updates of this phase in a row were skipped, with this one."""
        self._skipped[phase] = self._skipped.get(phase, 0) + 1 if skipped else 0
        return self._skipped[phase]

    def pauses_after(self, steps_done: int) -> bool:
        """Whether `pause` must be called after this many steps."""
        if is_distributed():  # all processes must end after the same step
            self.terminated |= multihost_utils.reached_preemption_sync_point(steps_done)
        return self.terminated or self._saves_after(steps_done) or self._evaluates_after(steps_done)

    def pause(self, steps_done: int, state: TrainState) -> bool:
        """Saves and then evaluates, if the config says so for this step.

        Returns:
          Whether the run ends here, because of a signal or because the student no longer improves.
        """
        if self.terminated or self._saves_after(steps_done) or self._evaluates_after(steps_done):
            positions = {
                name: {"position": stream.get_state(), "digest": stream.digest} for name, stream in self.streams.items()
            }
            with work(f"saving step {steps_done}"):
                self.checkpoints.save(steps_done, state, positions, self.provenance)
        if self.terminated:
            self.checkpoints.wait()
            self.display.close()
            self.display.print(
                f"stopped by a signal: saved at step {steps_done}; the same command continues from there"
            )
            return True
        return self.evaluate_student(steps_done, state)

    def _saves_after(self, steps_done: int) -> bool:
        return _is_due(steps_done, self.config.checkpoints.every, self.config.steps)

    def _evaluates_after(self, steps_done: int) -> bool:
        return _is_due(steps_done, self.config.evaluation.every, self.config.steps)

    # ----------------------------------------------------------------- evaluation

    def evaluate_student(self, steps_done: int, state: TrainState) -> bool:
        """Evaluates the student if the config says so for this step and it has not been done.

        Returns:
          Whether the run ends here, because the last `config.evaluation.patience` evaluations brought no new best.
        """
        if steps_done == 0 or not self._evaluates_after(steps_done):
            return False
        if steps_done not in self.ranks and not self._rank_student(steps_done, state):
            return False
        so_far = [self.ranks[step] for step in sorted(self.ranks) if step <= steps_done]
        patience = self.config.evaluation.patience
        if not out_of_patience(so_far, patience):
            return False
        best = max(sorted(self.ranks, reverse=True), key=self.ranks.__getitem__)
        self.display.print(f"stopped: no better than step {best} for {patience} evaluations")
        return True

    def _rank_student(self, steps_done: int, state: TrainState) -> bool:
        """Evaluates the student and ranks its checkpoint; returns False if there are no benchmarks."""
        student, key = self.student.with_params(state.evaluated), self.student_key(steps_done)
        results = self.evaluate("student", steps_done, student, key, self.config.evaluation.questions)
        rank = self.rank(results)
        if rank is None:
            return False
        self.ranks[steps_done] = rank
        row = rank_row(steps_done, rank, self.comparison(results))
        self.writer.add_evaluation(row, "merit", rank.value)
        return True

    def rank(self, results: Sequence[Result]) -> Rank | None:
        """The rank of a checkpoint with these results, here by mean accuracy; None without results."""
        means = [mean for axis in AXES if (mean := axis_mean(results, axis))]
        return Rank(True, sum(mean for mean, _ in means) / len(means)) if means else None

    def comparison(self, results: Sequence[Result]) -> dict[str, Any]:
        """More fields for the row of eval.jsonl with a checkpoint's rank."""
        return {}

    def student_key(self, steps_done: int) -> str:
        """The key of the student's answers."""
        return runner.run_key(self.provenance["config_fingerprint"], steps_done)

    def evaluate(
        self, name: str, step: int, loaded: Loaded, key: str | None = None, questions: int | None = None
    ) -> list[Result]:
        """The results of a model on this run's benchmarks; arguments as in `Evaluator.run`."""
        evaluator = runner.Evaluator(self.config.evaluation, self.workdir, self.writer, self.display, self._printed)
        return evaluator.run(name, loaded, step, key, questions)

    # ----------------------------------------------------------------- the end

    def state_to_export(self, state: TrainState) -> TrainState:
        """The last state, or the best checkpoint's state if the config says so."""
        best = self.checkpoints.best()
        if self.config.checkpoints.export == "last" or best is None or best == int(state.step):
            return state
        self.checkpoints.wait()
        self.display.print(f"the best checkpoint is at step {best}")
        return self.checkpoints.restore(best, state)[0]

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint, exports the model to workdir/export and writes workdir/report.html."""
        with work(f"saving step {int(state.step)}"):
            self.checkpoints.wait()
            self.checkpoints.close()
        self.display.close()
        export, report = self.workdir / "export", self.workdir / "report.html"
        student = self.student.with_params(state.evaluated)
        steps = int(state.step)
        record = read_record(self.workdir, self.config, steps) if is_primary() else RunRecord()
        write_folder(export, student, self.provenance | {"steps": str(steps)}, record)
        self.display.print(f"exported: {export}")
        if self.config.log.report and is_primary():
            from camopd_jax.reporting.page import write_page  # slow to import, and only needed here

            with work("writing the report"):
                write_page([str(self.workdir)], report)
            self.display.print(f"report: {report}")
            if "://" not in str(report):
                self.writer.add_report(Path(report))
        self.writer.close()
        barrier("report")
        if self._lock is not None:
            self._lock.close()


def _check_same_rows(streams: Mapping[str, ResumableStream], digests: dict[str, str]) -> None:
    """Raises UserError unless this process reads the rows that process 0 reads."""
    different = [name for name, stream in streams.items() if stream.digest != digests[name]]
    if different:
        raise UserError(
            f"{different[0]} prompts here are not those of process 0; give all hosts the same files, templates and "
            "tokenizers"
        )


def _is_due(steps_done: int, every: int, steps: int) -> bool:
    """Whether something is due that happens after every `every` steps and at the end; never if `every` is 0."""
    return every > 0 and (steps_done % every == 0 or steps_done == steps)
