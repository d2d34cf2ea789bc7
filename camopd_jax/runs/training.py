"""The main command: load, evaluate, train with CaMOPD, evaluate, export."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from camopd_jax.config.consistency import warnings
from camopd_jax.config.methods import description
from camopd_jax.config.schema import TrainConfig
from camopd_jax.data.pipeline import counts_line
from camopd_jax.evals import tables
from camopd_jax.evals.comparison import Rank, comparison, rank_student
from camopd_jax.evals.outcome import outcome
from camopd_jax.evals.results import Result, on_questions
from camopd_jax.method import loop, schedule
from camopd_jax.method.branches import check_models, load_models, make_branches, make_teachers
from camopd_jax.method.optimizer import run_state
from camopd_jax.method.programs import student_programs
from camopd_jax.method.recorder import Recorder, StepRecord
from camopd_jax.method.setup import resolve
from camopd_jax.method.statistics import repetition
from camopd_jax.models import partition
from camopd_jax.runs import prompt_map, start, warm_up, written_prompts
from camopd_jax.runs.convergence import not_converged
from camopd_jax.runs.run import Run
from camopd_jax.runs.workdir import fix_date
from camopd_jax.runtime.distributed import run_on_all
from camopd_jax.runtime.jsonl import read_rows
from camopd_jax.runtime.memory import memory_gib
from camopd_jax.runtime.mesh import gather, local_rows
from camopd_jax.runtime.progress import compilations, work
from camopd_jax.types import Batch, TrainState

if TYPE_CHECKING:
    from camopd_jax.analysis.diagnosis import Diagnosis


def train(config: TrainConfig, workdir: str, loaded: Callable[[], None] = lambda: None) -> None:
    """Runs `train`: load, evaluate, train with CaMOPD, evaluate, export.

    Args:
      loaded: called when the models are loaded and the prompts read, before the devices compute.
    """
    fix_date(epath.Path(workdir))
    setups = [resolve(part) for part in schedule.parts(config)]
    models = run_on_all(lambda: load_models(setups[-1]))
    setups = written_prompts.write_missing(setups, models, config, workdir)
    setup = setups[-1]  # of the on-policy steps; the warm-up's is before it
    teachers = make_teachers(config, models)
    branches = run_on_all(lambda: make_branches(setup, models, teachers, setup.rows, config.seed))
    loaded()
    check_models(setup, models, branches)

    # ------------------------------------------------------------------------- state and steps
    run = TrainingRun(config, workdir)
    run_on_all(lambda: prompt_map.weigh_streams(setup, models, branches, run.workdir))
    models, of_start = start.begin(setup, models, branches, run.workdir)
    student = models.student
    of_parts = [warm_up.make_branches(part, models, branches, run.workdir) for part in setups[:-1]] + [branches]
    streams = {
        f"{schedule.prefix(part.config)}{name}": branch.prompts
        for part, of_part in zip(setups, of_parts, strict=True)
        for name, branch in of_part.items()
    }
    trained = partition.trained(student.params, config.optimizer.trained)
    provenance = {"method": description(config)} | models.provenance(config) | of_start
    state = run.restore(run_state(trained, config), student, streams, provenance)
    for warning in (*warnings(config), *models.warnings):
        run.display.print(f"warning: {warning}")
    for name, stream in streams.items():
        run.display.print(f"{name} prompts: {counts_line(stream.counts)}")
    run.baselines = {
        "general": run.evaluate("general", 0, models.general),
        "specialised": run.evaluate("specialised", 0, models.specialised),
    }
    programs = [student_programs(part, student, state, of_part) for part, of_part in zip(setups, of_parts, strict=True)]
    if config.diagnostics.every:
        from camopd_jax.analysis.diagnosis import Diagnosis  # imports scipy.stats, which is slow

        run.diagnosis = Diagnosis(setup, models, teachers, programs[-1])
    ended = run.evaluate_student(int(state.step), state)  # an evaluation may have been interrupted
    for of_part, compiled in zip(of_parts, programs, strict=True):
        if ended or int(state.step) >= compiled.setup.config.steps:
            continue
        recorder = Recorder(compiled, run)
        state = loop.run(of_part, compiled, state, recorder)
        ended = recorder.ended
    if run.terminated:
        return
    state = run.state_to_export(programs[-1].fetch(state))
    steps = int(state.step)
    results = run.evaluate("student", steps, student.with_params(state.evaluated), run.student_key(steps))
    metrics = read_rows(run.workdir / "metrics.jsonl")
    if compilations.programs:  # they are counted in commands, not in other programs that call this
        run.display.print(compilations.summary())
    for line in (clip_rates(metrics), *not_converged(metrics, list(config.branches))):
        run.display.print(line)
    if results:
        run.display.print(tables.accuracies(run.baselines | {"student": results}))
        covered = {benchmark.name: benchmark.covered for benchmark in config.evaluation.benchmarks}
        general, specialised = run.baselines["general"], run.baselines["specialised"]
        for what, how_much in outcome(general, specialised, results, covered):
            run.display.print(f"{what}: {how_much}")
    run.finish(state)  # its last lines are where the model and the report are


class TrainingRun(Run):
    """A run of `train`: writes steps as rows of its files, and ranks checkpoints by recovery and retention."""

    config: TrainConfig
    baselines: dict[str, list[Result]]  # results of the general and the specialised model
    diagnosis: "Diagnosis | None" = None

    def pauses_after(self, steps_done: int) -> bool:
        return super().pauses_after(steps_done) or self._diagnosis_due(steps_done)

    def evaluate_student(self, steps_done: int, state: TrainState) -> bool:
        ended = super().evaluate_student(steps_done, state)  # before the diagnosis, which may offload the average
        if self._diagnosis_due(steps_done) and steps_done not in self.writer.diagnosed_steps():
            assert self.diagnosis is not None  # `train` sets it if config.diagnostics.every > 0
            with work("measuring gradients"):
                self.writer.add_diagnosis(self.diagnosis(steps_done, state)[0])
        return ended

    def _diagnosis_due(self, steps_done: int) -> bool:
        every, config = self.config.diagnostics.every, self.config
        due = every > 0 and (steps_done % every == 0 or steps_done == config.steps)
        return due and steps_done >= config.warm_up.steps  # it measures the gradients of on-policy steps

    def _saves_after(self, steps_done: int) -> bool:
        return super()._saves_after(steps_done) or steps_done == self.config.warm_up.steps

    def rank(self, results: Sequence[Result]) -> Rank | None:
        return rank_student(*self._baselines(results), results)

    def comparison(self, results: Sequence[Result]) -> dict[str, Any]:
        """Recovery or retention for every benchmark and for the axis means, each with its standard error."""
        return comparison(*self._baselines(results), results)

    def _baselines(self, results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
        """The teachers' results on the student's questions."""

        def baseline(name: str) -> list[Result]:
            pairs = zip(self.baselines[name], results, strict=True)
            return [on_questions(row, range(of_student["n"])) for row, of_student in pairs]

        return baseline("general"), baseline("specialised")

    def log(self, record: StepRecord) -> None:
        metrics = jax.tree.map(lambda value: np.asarray(value).tolist(), record.metrics)
        batches = {f"{record.prefix}{name}": batch for name, batch in record.batches.items()}
        metrics = {f"{record.prefix if name in record.batches else ''}{name}": of for name, of in metrics.items()}
        answer_tables = {name: metrics.get(name, metrics).pop("answers") for name in batches}
        answers = [(batch.rollout.tokens, batch.rollout.lengths) for batch in batches.values()]
        row = {
            "step": record.step,
            "phase": record.phase,
            **metrics,
            "repetition": float(np.mean([repetition(*map(gather, pair)) for pair in answers])),
            "seconds": record.seconds,
            "tokens_per_second": metrics["response_tokens"] / sum(record.seconds.values()),
            "memory_gib": memory_gib(),
        }
        samples = [self._samples(record.step, name, batch) for name, batch in batches.items()]
        self.record(row, [sample for of_branch in samples for sample in of_branch])
        if self.config.log.selection:
            self.writer.add_selection([
                {"step": record.step, "phase": name}
                | {column: _rounded(values) if column in _MEASURES else values for column, values in table.items()}
                for name, table in answer_tables.items()
            ])  # fmt: skip

    def _samples(self, step: int, branch: str, batch: Batch) -> list[dict[str, Any]]:
        """The first answers of the batch, with each token's gap and its log-probabilities from scoring and sampling."""
        prompts, rollout = jax.tree.map(local_rows, (batch.prompts, batch.rollout))
        log_probs, index, weights = jax.tree.map(local_rows, (batch.log_probs, batch.index, batch.selection.weights))
        decode, several = self.student.tokenizer.decode, self.config.rollout.answers_per_prompt
        rows = []
        for i in range(min(self.config.log.samples, len(index))):
            length = rollout.lengths[i]
            tokens = rollout.tokens[i, :length]
            rows.append(
                {
                    "step": step,
                    "phase": branch,
                    "prompt_index": int(index[i]),
                    "prompt": decode(prompts.tokens[i, : prompts.lengths[i]]),
                    "response": decode(tokens),
                    "tokens": [decode([token]) for token in tokens],
                    "gaps": _rounded(log_probs.gap[i, :length]),
                    "logprobs": _rounded(log_probs.student[i, :length]),
                    "sampler_logprobs": _rounded(rollout.log_probs[i, :length]),
                    "selected": bool(weights[i]),
                    "finish_reason": "stop" if rollout.stopped[i] else "length",
                }
                | ({"answer": i % several} if several > 1 else {})
            )
        return rows


_MEASURES = ("score", "entropy", "student_loss", "teacher_loss")


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def clip_rates(metrics: list[dict[str, Any]]) -> str:
    """A line with the share of clipped gradients in each phase, and advice if nearly all are clipped."""
    clipped: dict[str, list[float]] = {}
    for row in metrics:
        clipped.setdefault(row["phase"], []).append(row["grad_clipped"])
    rates = {phase: sum(steps) / len(steps) for phase, steps in clipped.items()}
    text = "gradients clipped: " + ", ".join(f"{100 * rate:.0f} % of {phase} steps" for phase, rate in rates.items())
    if len(rates) > 1 and min(rates.values()) > 0.95:
        text += (
            "; clipping in almost every step gives all gradients the same norm and cancels the branches' scales: raise "
            "config.optimizer.clip_norm to let the scales act"
        )
    return text
