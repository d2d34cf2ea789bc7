"""Supervised fine-tuning: next-token cross-entropy on the answers, mean over the tokens of each batch."""

import time
from functools import partial

import jax
from etils import epath
from jax.sharding import Mesh

from camopd_jax.config.consistency import warnings
from camopd_jax.config.schema import SftConfig
from camopd_jax.data import answers
from camopd_jax.data.pipeline import SftStream, counts_line
from camopd_jax.inference import loading
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.model_check import check_log_probs
from camopd_jax.method.gradient import Gradient, GradientAccumulator, Loss, LossInputs
from camopd_jax.method.objectives import OBJECTIVES
from camopd_jax.method.optimizer import run_state
from camopd_jax.method.setup import resolve_fine_tuning, rows_at_once
from camopd_jax.method.update import sft_update
from camopd_jax.method.weights import cross_entropy_weights
from camopd_jax.models import partition
from camopd_jax.rollout.score import micro_batches
from camopd_jax.runs.run import Run
from camopd_jax.runs.workdir import fix_date
from camopd_jax.runtime.distributed import run_on_all
from camopd_jax.runtime.memory import memory_gib
from camopd_jax.runtime.mesh import global_rows, rows_of_process
from camopd_jax.types import Params, Sequences


def sft(config: SftConfig, workdir: str) -> None:
    """Runs `sft`: load, evaluate, train, evaluate, export."""
    fix_date(epath.Path(workdir))
    mesh = resolve_fine_tuning(config)

    def begin() -> tuple[Loaded, SftStream]:
        folder = loading.find(config.model, "config.model")
        loading.check_adapter(config.adapter, folder, "config.model")
        loaded = loading.load_trained(folder, mesh, config, context=config.max_tokens)
        return loaded, SftStream(config, loaded.reader, rows_of_process(mesh, config.batch_size))

    student, stream = run_on_all(begin)
    check_log_probs(student, f"config.model = {config.model}", stream.first)
    provenance = {
        "method": "supervised fine-tuning",
        "model": config.model,
        "fingerprint": loading.fingerprint(student.folder),
    }
    run = Run(config, workdir)
    state = run_state(partition.trained(student.params, config.optimizer.trained), config)
    state = run.restore(state, student, {"data": stream}, provenance)
    of_ends = answers.end_warnings(student.folder, student.tokenizer, config.data.template)
    for warning in (*warnings(config), *of_ends, *stream.warnings):
        run.display.print(f"warning: {warning}")
    run.display.print(f"conversations: {counts_line(stream.counts)}")
    run.evaluate("start", 0, student)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    loss = Loss(student.model, OBJECTIVES["cross_entropy"]())
    accumulator = GradientAccumulator(loss, shardings.params, config.compute.logits_chunk)
    update = jax.jit(partial(sft_update, config=config), donate_argnums=0, out_shardings=(shardings, None))
    ended = run.evaluate_student(int(state.step), state)  # an evaluation may have been interrupted before this start
    for step in range(int(state.step), 0 if ended else config.steps):
        started = time.perf_counter()
        batch = global_rows(mesh, next(stream), config.batch_size)
        params = student.with_params(state.params).params
        state, metrics = update(state, gradient(config, mesh, accumulator, params, state.params, batch), batch)
        row = {"step": step, "phase": "sft"} | {name: value.item() for name, value in metrics.items()}
        seconds = time.perf_counter() - started
        speed = {"tokens_per_second": row["response_tokens"] / seconds, "memory_gib": memory_gib()}
        run.record(row | {"seconds": {"update": seconds}} | speed)
        if run.pauses_after(step + 1) and run.pause(step + 1, state):
            break
    if run.terminated:
        return
    state = run.state_to_export(state)
    steps = int(state.step)
    run.evaluate("student", steps, student.with_params(state.evaluated), run.student_key(steps))
    run.finish(state)


def gradient(
    config: SftConfig, mesh: Mesh, accumulator: GradientAccumulator, params: Params, trained: Params, batch: Sequences
) -> Gradient:
    """The gradient of the cross-entropy of a batch, computed in micro-batches of rows of similar length."""
    parts = micro_batches(mesh, batch, rows_at_once(config.optimizer), config.smallest_bucket)
    weights = cross_entropy_weights(batch.lengths, batch.tokens.shape[1])
    return accumulator(params, trained, LossInputs(batch, weights), parts)
