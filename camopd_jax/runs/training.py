"""The main job: load, measure, alternate recovery and review, measure again, export."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.runtime import cli
from camopd_jax.method.branches import STREAMS, load_models, make_branches
from camopd_jax.config.schema import Method, TrainConfig
from camopd_jax.analysis.diagnosis import Diagnosis
from camopd_jax.evals import tables
from camopd_jax.evals.comparison import Rank, comparison, rank_student
from camopd_jax.evals.results import Result, on_questions
from camopd_jax.runs.run import Host
from camopd_jax.runtime.jsonl import read_rows
from camopd_jax.runtime.metrics import memory_gib
from camopd_jax.method.optimizer import init_state
from camopd_jax.method.loop import Outcome
from camopd_jax.runtime.distributed import run_on_all
from camopd_jax.runtime.mesh import local_rows, make_mesh, gather
from camopd_jax.method.statistics import repetition
from camopd_jax.types import Scored, TrainState


def train(config: TrainConfig, workdir: str) -> None:
    """Runs the whole job: load, measure, alternate recovery and review, measure again, export."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    loop.check_batches(config, mesh)
    loop.check_remat(config, loading.matmul_dtype(config.compute))
    rows = loop.batch_rows(config)

    models = run_on_all(lambda: load_models(config, mesh))
    student = models.student
    branches = run_on_all(lambda: make_branches(config, models, mesh, rows, config.seed))
    streams = {STREAMS[name]: branch.prompts for name, branch in branches.items()}

    # ------------------------------------------------------------------------- state, then steps
    provenance = {"method": method_name(config.method)} | models.provenance(config)
    host = TrainHost(config, workdir, student, streams, provenance)
    state = host.restore(init_state(student.params, config.method.moments))
    if models.warning:
        host.display.say(f"warning: {models.warning}")
    host.display.say(", ".join(f"{name} prompts: {stream.counts}" for name, stream in streams.items()))
    host.baselines = {
        "general": host.evaluate("general", 0, models.general),
        "specialised": host.evaluate("specialised", 0, models.specialised),
    }
    programs = loop.compile_programs(config, student.model, student.eos_ids, state)
    if config.diagnostics.every:
        host.diagnosis = Diagnosis(config, models, mesh, programs)
    if not host.measure(int(state.step), state):  # the last start may have ended in the middle of it
        state = loop.run(config, branches, programs, state, host)
    if host.terminated:
        return
    state = host.chosen(state)
    steps = int(state.step)
    scores = host.evaluate("student", steps, student.with_params(state.params), host.student_key(steps))
    host.finish(state)
    host.display.say(clip_rates(read_rows(host.workdir / "metrics.jsonl")))
    if scores:
        host.display.say(tables.accuracies(host.baselines | {"student": scores}))


class TrainHost(Host):
    """Turns a step's outcome into a row of metrics.jsonl and a few samples, and scores into recovery and retention."""

    baselines: dict[str, list[Result]]  # scores of the general and the specialised model
    diagnosis: Diagnosis | None = None

    def due(self, steps_done: int) -> bool:
        return super().due(steps_done) or self._diagnosis_due(steps_done)

    def measure(self, steps_done: int, state: TrainState) -> bool:
        if self._diagnosis_due(steps_done) and steps_done not in self.writer.diagnosed():
            self.display.progress("looking at the gradients")
            self.writer.diagnosis(self.diagnosis(steps_done, state.params)[0])
        return super().measure(steps_done, state)

    def _diagnosis_due(self, steps_done: int) -> bool:
        every = self.config.diagnostics.every
        return every > 0 and (steps_done % every == 0 or steps_done == self.config.steps)

    def standing(self, results: Sequence[Result]) -> Rank | None:
        return rank_student(*self._baselines(results), results)

    def comparison(self, results: Sequence[Result]) -> dict[str, Any]:
        """Recovery or retention of every benchmark and of the axis means, each with its standard error."""
        return comparison(*self._baselines(results), results)

    def _baselines(self, results: Sequence[Result]) -> list[list[Result]]:
        """The teachers' scores on the questions that the student was asked."""
        return [
            [on_questions(row, range(asked["n"])) for row, asked in zip(self.baselines[name], results, strict=True)]
            for name in ("general", "specialised")
        ]

    def log(self, outcome: Outcome) -> None:
        metrics = jax.tree.map(lambda value: np.asarray(value).tolist(), outcome.metrics)
        tables = {name: metrics.get(name, metrics).pop("answers") for name in outcome.parts}
        said = {name: (part.rollout.tokens, part.rollout.lengths) for name, part in outcome.parts.items()}
        row = {
            "step": outcome.step,
            "phase": outcome.phase,
            **metrics,
            "repetition": float(np.mean([repetition(*map(gather, answers)) for answers in said.values()])),
            "seconds": outcome.seconds,
            "tokens_per_second": metrics["response_tokens"] / sum(outcome.seconds.values()),
            "memory_gib": memory_gib(),
        }
        samples = [self._samples(outcome.step, name, part) for name, part in outcome.parts.items()]
        self.record(row, [sample for of_branch in samples for sample in of_branch])
        if self.config.log.selection:
            self.writer.selection([
                {"step": outcome.step, "phase": name}
                | {column: _rounded(values) if column in _MEASURES else values for column, values in table.items()}
                for name, table in tables.items()
            ])  # fmt: skip

    def _samples(self, step: int, branch: str, part: Scored) -> list[dict]:
        """The first answers of the batch, with each token's gap, and its log-probability as scored and as sampled."""
        arrays = (part.prompts.tokens, part.prompts.lengths, part.index, part.rollout.tokens, part.rollout.lengths,
                  part.rollout.log_probs, part.rollout.stopped, part.scores.student, part.scores.teacher,
                  part.selection.weights)  # fmt: skip
        asked, asked_lengths, index, tokens, lengths, sampler, stopped, student, teacher, weights = map(
            local_rows, arrays
        )
        decode = self.student.tokenizer.decode
        return [
            {
                "step": step,
                "phase": branch,
                "prompt_index": int(index[i]),
                "prompt": decode(asked[i, : asked_lengths[i]]),
                "response": decode(tokens[i, : lengths[i]]),
                "tokens": [decode([t]) for t in tokens[i, : lengths[i]]],
                "gaps": _rounded((teacher - student)[i, : lengths[i]]),
                "logprobs": _rounded(student[i, : lengths[i]]),
                "sampler_logprobs": _rounded(sampler[i, : lengths[i]]),
                "selected": bool(weights[i]),
                "finish_reason": "stop" if stopped[i] else "length",
            }
            for i in range(min(self.config.log.samples, len(tokens)))
        ]


def method_name(method: Method) -> str:
    """What a model card calls the method."""
    if method.answers == "teacher":
        return "distillation on teachers' answers"
    return {"alternate": "CaMOPD (arXiv 2605.27115)", "mixed": "mixed on-policy distillation"}[method.schedule]


_MEASURES = ("score", "entropy", "student_loss", "teacher_loss")


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def clip_rates(metrics: list[dict]) -> str:
    """How often each phase's gradient was clipped, and what it means where that was always."""
    clipped = {phase: [row["grad_clipped"] for row in metrics if row["phase"] == phase] for phase in loop.UPDATES}
    rates = {phase: sum(steps) / len(steps) for phase, steps in clipped.items() if steps}
    told = "gradients clipped: " + ", ".join(f"{100 * rate:.0f} % of {phase} steps" for phase, rate in rates.items())
    if len(rates) > 1 and min(rates.values()) > 0.95:
        told += (
            "; a clip that always bites makes all gradients equally long and cancels the phases' scales: raise "
            "config.optimizer.clip_norm to let them act"
        )
    return told
