"""The host's side of a run: its work directory, checkpoints, metrics, evaluations and export.

`train` and `sft` differ in their steps; all that surrounds the steps is here.
"""

import signal
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from camopd_jax import engine
from camopd_jax.checkpoint import Checkpoints, claim_workdir
from camopd_jax.config import Benchmark, Config, fingerprint
from camopd_jax.data import sources, templates
from camopd_jax.engine import Loaded
from camopd_jax.errors import UserError
from camopd_jax.evals import report
from camopd_jax.export import write_folder
from camopd_jax.jsonl import drop_rows_after, read_rows
from camopd_jax.metrics import Display, MetricsWriter
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
        claim_workdir(self.workdir, config)
        self.checkpoints = Checkpoints(workdir, config.checkpoints)

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
        if jax.process_index() == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                drop_rows_after(self.workdir / name, int(state.step))
        self.writer = MetricsWriter(self.workdir, self.config.log.tensorboard)
        self.display = Display(self.config.steps, int(state.step))
        if step is not None:
            self.display.say(f"going on from step {step}")
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
        if jax.process_count() > 1:  # all processes have to end after the same step
            self.terminated |= multihost_utils.reached_preemption_sync_point(steps_done)
        return self.terminated or self._save_due(steps_done) or self._evaluation_due(steps_done)

    def milestone(self, steps_done: int, state: TrainState) -> bool:
        """Evaluates and saves where due. True: the process was asked to end, and all is saved."""
        accuracy = None
        if self._evaluation_due(steps_done) and not self.terminated:
            accuracy = _overall(self.evaluate("student", steps_done, self.student.with_params(state.params)))
        if self.terminated or self._save_due(steps_done):
            positions = {name: stream.get_state() for name, stream in self.streams.items()}
            self.checkpoints.save(steps_done, state, positions, self.provenance, accuracy)
        if self.terminated:
            self.checkpoints.wait()
            self.display.close()
            self.display.say(f"asked to end: saved at step {steps_done}; the same command goes on from there")
        return self.terminated

    def _save_due(self, steps_done: int) -> bool:
        return steps_done % self.config.checkpoints.every == 0 or steps_done == self.config.steps

    def _evaluation_due(self, steps_done: int) -> bool:
        every = self.config.evaluation.every
        return steps_done == self.config.steps or (every > 0 and steps_done % every == 0)

    def _terminate(self, *_) -> None:
        self.terminated = True

    # ----------------------------------------------------------------- evaluation and export

    def evaluate(self, name: str, step: int, loaded: Loaded) -> list[report.Result]:
        """Every benchmark of the config, on one model; what eval.jsonl holds already is taken from there."""
        known = {(row["model"], row["step"], row["benchmark"]): row for row in read_rows(self.workdir / "eval.jsonl")}
        rows = []
        for benchmark in self.config.evaluation.benchmarks:
            row = known.get((name, step, benchmark.name))
            if row is None:
                row = {"step": step, "model": name} | run_benchmark(
                    benchmark, loaded, self.config.evaluation.batch_size
                )
                self.writer.evaluation(row)
                self.display.say(f"{name} at step {step}: {benchmark.name} {100 * row['accuracy']:.1f} %")
            rows.append(row)
        return rows

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint and exports the model to workdir/export."""
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


def run_benchmark(benchmark: Benchmark, loaded: Loaded, batch_size: int) -> report.Result:
    """Answers a benchmark's questions greedily and grades them."""
    rows = sources.read(benchmark.source, limit=benchmark.limit, field=f"config.evaluation.benchmarks {benchmark.name}")
    missing = next((i for i, row in enumerate(rows, 1) if "answer" not in row), None)
    if missing is not None:
        raise UserError(f'{benchmark.source} row {missing}: no "answer" to grade against')
    prompts = [templates.prompt_ids(loaded.tokenizer, row, benchmark.template) for row in rows]
    answers = engine.answer(loaded, prompts, max_new=benchmark.max_response_tokens, batch_size=batch_size)
    return report.result(
        benchmark,
        [row["answer"] for row in rows],
        [a.text for a in answers],
        [len(a.ids) for a in answers],
        [a.stopped for a in answers],
    )


def _overall(results: list[report.Result]) -> float | None:
    """Mean of general and domain accuracy: what keep_best goes by."""
    means = [mean for axis in ("general", "domain") if (mean := report.axis_mean(results, axis))]
    return sum(mean[0] for mean in means) / len(means) if means else None
