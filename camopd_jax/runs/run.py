"""The host's side of a run: its work directory, checkpoints, metrics, evaluations and export.

`train` and `sft` differ in their steps; all that surrounds the steps is here.
"""

import signal
from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.experimental import multihost_utils

from camopd_jax.evals import runner
from camopd_jax.runs.checkpoint import Checkpoints, claim_workdir
from camopd_jax.config.schema import Config
from camopd_jax.inference.loading import Loaded
from camopd_jax.errors import UserError
from camopd_jax.evals.comparison import Rank, out_of_patience, rank_row
from camopd_jax.evals.results import AXES, Result, axis_mean
from camopd_jax.runs.export import write_folder
from camopd_jax.runtime.jsonl import drop_rows_after
from camopd_jax.runtime.metrics import Display, MetricsWriter
from camopd_jax.runtime.distributed import is_primary, is_distributed, run_on_all, barrier
from camopd_jax.config.identity import fingerprint
from camopd_jax.types import TrainState


class Host:
    """Owns a work directory. `record` takes metrics; `due` and `milestone` serve the loop of steps."""

    def __init__(
        self, config: Config, workdir: str, student: Loaded, streams: dict[str, Any], provenance: dict[str, str]
    ):
        """Claims the work directory.

        Args:
          student: the model in training; its `params` are those it starts from.
          streams: the data streams whose positions belong to a checkpoint.
          provenance: the models the run starts from, with their fingerprints: checkpoints belong to
            them, and the exported model card tells of them.

        Raises:
          UserError: if the work directory belongs to a run with another config.
        """
        self.config, self.student, self.streams = config, student, streams
        self.provenance = provenance | {"config_fingerprint": fingerprint(config)}
        self.workdir = epath.Path(workdir)
        self.terminated = False
        run_on_all(lambda: runner.check(config.evaluation))
        claim_workdir(self.workdir, config)
        self.standings = runner.broadcast_ranks(self.workdir)
        self.checkpoints = Checkpoints(workdir, config.checkpoints, self.standings)

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint's state, on the given state's shardings; without a checkpoint, `state`."""
        if (step := self.checkpoints.latest()) is not None:
            state, positions, provenance = self.checkpoints.restore(step, state)
            for name, value in self.provenance.items():
                if provenance.get(name) != value:
                    raise UserError(
                        f"{self.workdir}: its checkpoints were made with another {name} ({provenance.get(name)}, "
                        f"now {value}); give the old one, or a new --workdir"
                    )
            for name, stream in self.streams.items():
                stream.set_state(positions[name])
        if is_primary():
            for name in ("metrics.jsonl", "samples.jsonl", "selection.jsonl"):
                drop_rows_after(self.workdir / name, int(state.step))
            drop_rows_after(self.workdir / "diagnostics.jsonl", int(state.step) + 1)  # these tell of the model after it
        self.writer = MetricsWriter(self.workdir, self.config.log.tensorboard)
        self.display = Display(self.config.steps, int(state.step))
        if step is not None:
            self.display.say(f"going on from step {step}")
        if not is_distributed():  # else JAX takes the signal, and tells the others of it
            signal.signal(signal.SIGTERM, self._terminate)
        return state

    # ----------------------------------------------------------------- between the steps

    def record(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Writes a step's metrics and samples, and shows them."""
        self.writer.step(row)
        self.writer.samples(samples)
        self.display.step(row)
        if row["skipped"] >= self.config.max_skipped:
            self.writer.close()
            self.display.close()
            raise UserError(
                f"config.optimizer.learning_rate = {self.config.optimizer.learning_rate}: {row['skipped']} "
                f"updates in a row, the last at step {row['step']}, had a loss or gradient that is not finite; "
                "lower it and give a new --workdir. Checkpoints are kept"
            )

    def due(self, steps_done: int) -> bool:
        """Whether a checkpoint or an evaluation follows, or the end."""
        if is_distributed():  # all have to end after the same step
            self.terminated |= multihost_utils.reached_preemption_sync_point(steps_done)
        return self.terminated or self._save_due(steps_done) or self._evaluation_due(steps_done)

    def milestone(self, steps_done: int, state: TrainState) -> bool:
        """Saves and evaluates where due, in this order: what was computed is safe before a long evaluation.

        True ends the run: the process was asked to end and all is saved, or patience is at its end.
        """
        if self.terminated or self._save_due(steps_done) or self._evaluation_due(steps_done):
            positions = {name: stream.get_state() for name, stream in self.streams.items()}
            self.checkpoints.save(steps_done, state, positions, self.provenance)
        if self.terminated:
            self.checkpoints.wait()
            self.display.close()
            self.display.say(f"asked to end: saved at step {steps_done}; the same command goes on from there")
            return True
        return self.measure(steps_done, state)

    def _save_due(self, steps_done: int) -> bool:
        return steps_done % self.config.checkpoints.every == 0 or steps_done == self.config.steps

    def _evaluation_due(self, steps_done: int) -> bool:
        every = self.config.evaluation.every
        return every > 0 and (steps_done % every == 0 or steps_done == self.config.steps)

    def _terminate(self, *_) -> None:
        self.terminated = True

    # ----------------------------------------------------------------- evaluation and export

    def measure(self, steps_done: int, state: TrainState) -> bool:
        """The evaluation between the steps, if one is due here and not done; whether patience is at its end."""
        if steps_done == 0 or not self._evaluation_due(steps_done):
            return False
        if steps_done not in self.standings:
            student, key = self.student.with_params(state.params), self.student_key(steps_done)
            results = self.evaluate("student", steps_done, student, key, self.config.evaluation.questions)
            standing = self.standing(results)
            if standing is None:
                return False
            self.standings[steps_done] = standing
            self.writer.evaluation(
                rank_row(steps_done, standing, self.comparison(results)), "merit", standing.value
            )
        in_order = [self.standings[step] for step in sorted(self.standings) if step <= steps_done]
        if ended := out_of_patience(in_order, self.config.evaluation.patience):
            best = max(sorted(self.standings, reverse=True), key=self.standings.__getitem__)
            self.display.say(f"no better than step {best} for {self.config.evaluation.patience} evaluations: ends here")
        return ended

    def standing(self, results: Sequence[Result]) -> Rank | None:
        """What a checkpoint's scores are worth: here, their mean."""
        means = [mean for axis in AXES if (mean := axis_mean(results, axis))]
        return Rank(True, sum(mean for mean, _ in means) / len(means)) if means else None

    def comparison(self, results: Sequence[Result]) -> dict[str, Any]:
        """Further facts on a checkpoint's scores."""
        return {}

    def student_key(self, steps_done: int) -> str:
        return runner.run_key(self.provenance["config_fingerprint"], steps_done)

    def evaluate(
        self, name: str, step: int, loaded: Loaded, key: str | None = None, questions: int | None = None
    ) -> list[Result]:
        """The results of a model on this run's benchmarks."""
        evaluator = runner.Evaluator(self.config.evaluation, self.workdir, self.writer, self.display)
        return evaluator.run(name, loaded, step, key, questions)

    def chosen(self, state: TrainState) -> TrainState:
        """The state to export: the last, or the best checkpoint's where the config asks for it."""
        best = self.checkpoints.best()
        if self.config.checkpoints.export == "last" or best is None or best == int(state.step):
            return state
        self.checkpoints.wait()
        self.display.say(f"the best checkpoint is that of step {best}")
        return self.checkpoints.restore(best, state)[0]

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint, exports the model to workdir/export and draws workdir/report.html."""
        self.checkpoints.wait()
        self.checkpoints.close()
        self.writer.close()
        self.display.close()
        write_folder(
            self.workdir / "export",
            self.student.with_params(state.params),
            self.provenance | {"steps": str(int(state.step))},
        )
        self.display.say(f"exported: {self.workdir / 'export'}")
        if self.config.log.report and is_primary():
            from camopd_jax.reporting.page import write_page  # draws: slow to import, and only needed here

            write_page([str(self.workdir)], self.workdir / "report.html")
            self.display.say(f"report: {self.workdir / 'report.html'}")
        barrier("report")
