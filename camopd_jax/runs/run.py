"""A run in its work directory: what `train` and `sft` do around their steps, which is the same for both."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath
from jax.experimental import multihost_utils

from camopd_jax.config.identity import fingerprint
from camopd_jax.config.schema import Config
from camopd_jax.errors import UserError
from camopd_jax.evals import runner
from camopd_jax.evals.comparison import Rank, out_of_patience, rank_row
from camopd_jax.evals.results import AXES, Result, axis_mean
from camopd_jax.inference.loading import Loaded
from camopd_jax.runs.checkpoint import CheckpointStore
from camopd_jax.runs.export import write_folder
from camopd_jax.runs.workdir import claim_workdir
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import barrier, is_distributed, is_primary, run_on_all
from camopd_jax.runtime.jsonl import drop_rows_after
from camopd_jax.runtime.metrics import MetricsWriter
from camopd_jax.types import TrainState

# Files of a row for each step, and how many steps' rows a state of `n` steps keeps. Diagnostics are of the model that a
# step begins with, so that those of step n are there before it is done.
KEPT_ROWS = {"metrics.jsonl": 0, "samples.jsonl": 0, "selection.jsonl": 0, "diagnostics.jsonl": 1}


class Stream(Protocol):
    """A data stream whose position belongs to a checkpoint."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Run:
    """Owns a work directory: claims it, restores its last checkpoint, writes metrics, saves, evaluates and exports.

    Calls come in this order: `restore`; for every step `record`, and where `pauses_after` the step, `pause`; then
    `state_to_export` and `finish`.
    """

    writer: MetricsWriter  # these two are there after `restore`
    display: Display

    def __init__(
        self,
        config: Config,
        workdir: str,
        student: Loaded,
        streams: Mapping[str, Stream],
        provenance: dict[str, str],
    ) -> None:
        """Claims the work directory.

        Args:
          student: the model in training; its `params` are those it starts from.
          streams: by name.
          provenance: the models the run starts from, with their fingerprints: its checkpoints belong to them, and the
            exported model card names them.

        Raises:
          UserError: if the work directory belongs to a run with another config.
        """
        self.config, self.student, self.streams = config, student, streams
        self.provenance = provenance | {"config_fingerprint": fingerprint(config)}
        self.workdir = epath.Path(workdir)
        self.terminated = False  # whether this process was asked to end
        run_on_all(lambda: runner.check(config.evaluation))
        claim_workdir(self.workdir, config)
        self.ranks = runner.broadcast_ranks(self.workdir)  # of the evaluated checkpoints, by step
        self.checkpoints = CheckpointStore(workdir, config.checkpoints, self.ranks)

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint's state, with the given state's shardings; without a checkpoint, `state`.

        Raises:
          UserError: if the checkpoint cannot be read, or was made with other models.
        """
        last = self.checkpoints.latest()
        if last is not None:
            state, positions, provenance = self.checkpoints.restore(last, state)
            self.checkpoints.check_complete(last, "provenance", provenance, self.provenance)
            self.checkpoints.check_complete(last, "positions", positions, self.streams)
            self._check_provenance(provenance)
            for name, stream in self.streams.items():
                stream.set_state(positions[name])
        steps_done = int(state.step)
        if is_primary():
            for file, more in KEPT_ROWS.items():
                drop_rows_after(self.workdir / file, steps_done + more)
        self.writer = MetricsWriter(self.workdir, self.config.log.tensorboard)
        self.display = Display(self.config.steps, steps_done)
        if last is not None:
            self.display.say(f"continuing from step {last}")
        if not is_distributed():  # else JAX takes the signal, and passes it on to the other processes
            signal.signal(signal.SIGTERM, self._terminate)
        return state

    def _check_provenance(self, provenance: dict[str, str]) -> None:
        for name, value in self.provenance.items():
            if provenance.get(name) != value:
                raise UserError(
                    f"{self.workdir}: its checkpoints were made with another {name} ({provenance.get(name)}, "
                    f"now {value}); give the old one, or a new --workdir"
                )

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    # ----------------------------------------------------------------- between the steps

    def record(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Writes a step's metrics and samples, and shows them.

        Raises:
          UserError: if too many updates in a row were not finite.
        """
        self.writer.add_step(row)
        self.writer.add_samples(samples)
        self.display.step(row)
        if row["skipped"] >= self.config.max_skipped:
            self.writer.close()
            self.display.close()
            raise UserError(
                f"config.optimizer.learning_rate = {self.config.optimizer.learning_rate}: {row['skipped']} "
                f"updates in a row, the last at step {row['step']}, had a loss or gradient that is not finite; "
                "lower it and give a new --workdir. Checkpoints are kept"
            )

    def pauses_after(self, steps_done: int) -> bool:
        """Whether `pause` has something to do after so many steps."""
        if is_distributed():  # all have to end after the same step
            self.terminated |= multihost_utils.reached_preemption_sync_point(steps_done)
        return self.terminated or self._saves_after(steps_done) or self._evaluates_after(steps_done)

    def pause(self, steps_done: int, state: TrainState) -> bool:
        """Saves and evaluates where the config asks for it, in this order: an evaluation may take long.

        Returns:
          Whether the run ends here: this process was asked to end, or the student no longer gets better.
        """
        if self.terminated or self._saves_after(steps_done) or self._evaluates_after(steps_done):
            positions = {name: stream.get_state() for name, stream in self.streams.items()}
            self.checkpoints.save(steps_done, state, positions, self.provenance)
        if self.terminated:
            self.checkpoints.wait()
            self.display.close()
            self.display.say(f"stopped by a signal: saved at step {steps_done}; the same command continues from there")
            return True
        return self.evaluate_student(steps_done, state)

    def _saves_after(self, steps_done: int) -> bool:
        return _is_due(steps_done, self.config.checkpoints.every, self.config.steps)

    def _evaluates_after(self, steps_done: int) -> bool:
        return _is_due(steps_done, self.config.evaluation.every, self.config.steps)

    # ----------------------------------------------------------------- evaluation

    def evaluate_student(self, steps_done: int, state: TrainState) -> bool:
        """Evaluates the student between the steps, if the config asks for it here and it has not been done.

        Returns:
          Whether the run ends here: the last `config.evaluation.patience` evaluations brought nothing better.
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
        self.display.say(f"stopped: no better than step {best} for {patience} evaluations")
        return True

    def _rank_student(self, steps_done: int, state: TrainState) -> bool:
        """Evaluates the student and ranks its checkpoint; False without benchmarks to rank it by."""
        student, key = self.student.with_params(state.params), self.student_key(steps_done)
        results = self.evaluate("student", steps_done, student, key, self.config.evaluation.questions)
        rank = self.rank(results)
        if rank is None:
            return False
        self.ranks[steps_done] = rank
        row = rank_row(steps_done, rank, self.comparison(results))
        self.writer.add_evaluation(row, "merit", rank.value)
        return True

    def rank(self, results: Sequence[Result]) -> Rank | None:
        """How good a checkpoint with these results is: here, by their mean. None without results."""
        means = [mean for axis in AXES if (mean := axis_mean(results, axis))]
        return Rank(True, sum(mean for mean, _ in means) / len(means)) if means else None

    def comparison(self, results: Sequence[Result]) -> dict[str, Any]:
        """What else the line of eval.jsonl that ranks a checkpoint holds."""
        return {}

    def student_key(self, steps_done: int) -> str:
        """The key under which the student's answers are kept."""
        return runner.run_key(self.provenance["config_fingerprint"], steps_done)

    def evaluate(
        self, name: str, step: int, loaded: Loaded, key: str | None = None, questions: int | None = None
    ) -> list[Result]:
        """The results of a model on this run's benchmarks, as `Evaluator.run` takes it."""
        evaluator = runner.Evaluator(self.config.evaluation, self.workdir, self.writer, self.display)
        return evaluator.run(name, loaded, step, key, questions)

    # ----------------------------------------------------------------- the end

    def state_to_export(self, state: TrainState) -> TrainState:
        """The last state, or the best checkpoint's where the config asks for it."""
        best = self.checkpoints.best()
        if self.config.checkpoints.export == "last" or best is None or best == int(state.step):
            return state
        self.checkpoints.wait()
        self.display.say(f"the best checkpoint is at step {best}")
        return self.checkpoints.restore(best, state)[0]

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint, exports the model to workdir/export and draws workdir/report.html."""
        self.checkpoints.wait()
        self.checkpoints.close()
        self.writer.close()
        self.display.close()
        export, report = self.workdir / "export", self.workdir / "report.html"
        write_folder(export, self.student.with_params(state.params), self.provenance | {"steps": str(int(state.step))})
        self.display.say(f"exported: {export}")
        if self.config.log.report and is_primary():
            from camopd_jax.reporting.page import write_page  # draws: slow to import, and only needed here

            write_page([str(self.workdir)], report)
            self.display.say(f"report: {report}")
        barrier("report")


def _is_due(steps_done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; never if `every` is 0."""
    return every > 0 and (steps_done % every == 0 or steps_done == steps)
