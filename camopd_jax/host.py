"""The host's side of a run: its work directory, checkpoints, metrics, evaluations and export.

`train` and `sft` differ in their steps; all that surrounds the steps is here.
"""

import json
import signal
from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.experimental import multihost_utils

import jax
from camopd_jax import engine
from camopd_jax.checkpoint import Checkpoints, claim_workdir, truncate_jsonl
from camopd_jax.config import Benchmark, Config, fingerprint, to_json
from camopd_jax.data import sources, templates
from camopd_jax.engine import Loaded
from camopd_jax.errors import UserError
from camopd_jax.evals.run import Result, evaluate
from camopd_jax.export import write_folder
from camopd_jax.metrics import MetricsWriter, Progress
from camopd_jax.types import TrainState


class Host:
    """Owns a work directory. `record` takes metrics; `due` and `milestone` serve the phase loop."""

    def __init__(self, config: Config, workdir: str, student: Loaded, streams: dict[str, Any], provenance: dict[str, Any]):
        """Claims the work directory.

        Args:
          student: its `params` are those it starts from.
          streams: the iterators whose positions belong to a checkpoint.
          provenance: where the run's models come from, with their fingerprints: a checkpoint belongs to
            them, and the exported model card tells of them.

        Raises:
          UserError: if the work directory belongs to a run with another config.
        """
        self.config, self.workdir, self.student, self.streams = config, epath.Path(workdir), student, streams
        self.provenance = provenance
        claim_workdir(workdir, to_json(config), fingerprint(config))
        self.checkpoints = Checkpoints(workdir, config.checkpoints)
        self.terminated = False
        signal.signal(signal.SIGTERM, self._terminate)

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint's state, on the given state's shardings; without a checkpoint, `state`."""
        if self.checkpoints.latest() is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, positions, provenance = self.checkpoints.restore(None, abstract)
            for name, value in self.provenance.items():
                if provenance.get(name) != value:
                    raise UserError(f"{self.workdir}: its checkpoints were made with another {name} "
                                    f"({provenance.get(name)}, now {value}); give the old one or a new --workdir")
            for name, stream in self.streams.items():
                stream.set_state(positions[name])
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            truncate_jsonl(self.workdir / name, "step", int(state.step))
        self.writer = MetricsWriter(self.workdir, tensorboard=self.config.log.tensorboard)
        self.progress = Progress(total=self.config.steps, start=int(state.step))
        return state

    # ----------------------------------------------------------------- during the steps

    def record(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Writes a step's metrics and samples, and shows them."""
        self.writer.step(row)
        self.writer.samples(samples)
        self.progress.update(row)
        if row["skipped"] >= self.config.max_skipped:
            raise UserError(f"config.optimizer.learning_rate: {row['skipped']} updates in a row had a loss or gradient "
                            f"that is not finite, the last at step {row['step']}; lower it, or look at "
                            f"{self.workdir / 'samples.jsonl'}. The checkpoints are kept")

    def due(self, steps_done: int) -> bool:
        """Whether this step is followed by a checkpoint or an evaluation, or was the last."""
        if jax.process_count() > 1:  # every process has to see the same answer
            self.terminated = multihost_utils.reached_preemption_sync_point(steps_done)
        return self.terminated or self._save_due(steps_done) or self._evaluation_due(steps_done)

    def milestone(self, steps_done: int, state: TrainState) -> bool:
        """Evaluates and saves where due. True: the process was asked to end, and all is saved."""
        accuracy = None
        if self._evaluation_due(steps_done) and not self.terminated:
            results = self.evaluate("student", steps_done, self.student.with_params(state.params))
            accuracy = mean_of_axes(results)
        if self.terminated or self._save_due(steps_done):
            positions = {name: stream.get_state() for name, stream in self.streams.items()}
            self.checkpoints.save(steps_done, state, positions, self.provenance, accuracy)
        return self.terminated

    def _save_due(self, steps_done: int) -> bool:
        return steps_done % self.config.checkpoints.every == 0 or steps_done == self.config.steps

    def _evaluation_due(self, steps_done: int) -> bool:
        every = self.config.evaluation.every
        return steps_done == self.config.steps or (every > 0 and steps_done % every == 0)

    def _terminate(self, *_) -> None:
        self.terminated = True

    # ----------------------------------------------------------------- evaluation and export

    def evaluate(self, model_name: str, step: int, loaded: Loaded) -> list[Result]:
        """Every benchmark of the config on one model; appended to eval.jsonl, or read from there if it is in it."""
        before = {(r["model"], r["step"], r["benchmark"]): r for r in _read_jsonl(self.workdir / "eval.jsonl")}
        results = []
        for benchmark in self.config.evaluation.benchmarks:
            row = before.get((model_name, step, benchmark.name))
            if row is None:
                with self.progress.note(f"{model_name}: {benchmark.name}"):
                    row = {"step": step, "model": model_name} | run_benchmark(benchmark, loaded, self.config)
                self.writer.evaluation(row)
            results.append(row)
        return results

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint and writes the Hugging Face folder."""
        self.checkpoints.wait()
        out = self.workdir / "export"
        write_folder(out, self.student.with_params(state.params), self.provenance | {"steps": int(state.step)})
        self.progress.say(f"exported {out}")
