"""Gives a specialised model its general ability back (CaMOPD): the main job.

    python -m camopd_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m camopd_jax.train --config=configs/medqa.py --workdir=gs://bucket/medqa \\
        --config.optimizer.learning_rate=1e-6

Needs two Hugging Face checkpoints (the original model and the specialised one) and two files of
prompts; the config names them. The work directory then holds config.json, metrics.jsonl,
TensorBoard event files, samples.jsonl, eval.jsonl, checkpoints/ and, at the end, export/: the
recovered model as a Hugging Face folder.

Started again with the same command, a run goes on from its last checkpoint; SIGTERM saves one first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from camopd_jax import cli, engine, phases
from camopd_jax.config import Stream, TrainConfig
from camopd_jax.data import sources, templates
from camopd_jax.data.pipeline import PromptStream
from camopd_jax.engine import Loaded
from camopd_jax.errors import UserError
from camopd_jax.evals.run import table
from camopd_jax.host import Host
from camopd_jax.metrics import memory_gib
from camopd_jax.models import hf
from camopd_jax.optim import init_moments
from camopd_jax.phases import Branch, Outcome
from camopd_jax.sharding import check_rows, local_rows, make_mesh, rows_of_process
from camopd_jax.steps.statistics import repetition
from camopd_jax.types import TrainState

flags.DEFINE_string("workdir", None, "Directory of the run, made if it is not there; gs:// paths work.")


def train(config: TrainConfig, workdir: str) -> None:
    """Runs the whole job: load, measure, alternate recovery and review, measure again, export."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_rows(mesh, "config.rollout.batch_size", config.rollout.batch_size)
    check_rows(mesh, "config.optimizer.micro_batch", config.optimizer.micro_batch)
    check_rows(mesh, "config.evaluation.batch_size", config.evaluation.batch_size)

    # -------------------------------------------------------------------------- the three models
    general_folder = engine.find(config.general_model, "config.general_model")
    specialised_folder = engine.find(config.specialised_model, "config.specialised_model")
    templates.check_same_tokenizer(specialised_folder, general_folder)
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    vocab = min(engine.model_config(f, context).vocab_size for f in (general_folder, specialised_folder))

    def load(folder, dtype: str) -> Loaded:
        return engine.load(folder, mesh, config.compute, dtype=dtype, context=context, output_vocab_size=vocab)

    general_teacher = load(general_folder, engine.teacher_dtype(config.compute))
    domain_teacher = load(specialised_folder, engine.teacher_dtype(config.compute))
    student = load(specialised_folder, config.compute.params)

    # ---------------------------------------------------------------- the two streams of prompts
    def stream(part: Stream, teacher: Loaded, seed: int) -> PromptStream:
        return PromptStream(part, config.rollout, student.tokenizer, teacher.tokenizer, seed,
                            rows_of_process(mesh, config.rollout.batch_size))

    general_prompts = stream(config.general, general_teacher, config.seed)
    domain_prompts = stream(config.domain, domain_teacher, config.seed + 1)
    branches = {
        "recovery": Branch(general_prompts, general_teacher.model, general_teacher.params),
        "review": Branch(domain_prompts, domain_teacher.model, domain_teacher.params),
    }

    # ------------------------------------------------------------------------- state, then steps
    provenance = {
        "general_model": config.general_model, "general_fingerprint": hf.fingerprint(general_folder),
        "specialised_model": config.specialised_model, "specialised_fingerprint": hf.fingerprint(specialised_folder),
    }
    host = TrainHost(config, workdir, student, {"general": general_prompts, "domain": domain_prompts}, provenance)
    state = TrainState(step=jnp.int32(0), params=student.params, moments=init_moments(student.params, config.method.moments),
                       skipped=jnp.int32(0))
    state = host.restore(state)
    host.progress.say(f"general prompts: {general_prompts.counts}; domain prompts: {domain_prompts.counts}")
    before = {"general teacher": host.evaluate("general", 0, general_teacher),
              "specialised": host.evaluate("specialised", 0, domain_teacher)}
    programs = phases.compile_programs(config, student.model, student.eos_ids, state)
    state = phases.run(config, branches, programs, state, host)
    if host.terminated:
        host.progress.say(f"asked to end: saved at step {int(state.step)}; the same command goes on from there")
        return
    host.finish(state)
    recovered = host.evaluate("student", int(state.step), student.with_params(state.params))
    host.progress.say(table(before["general teacher"], before["specialised"], recovered))


class TrainHost(Host):
    """Turns a step's outcome into a row of metrics.jsonl and a few samples."""

    def log(self, outcome: Outcome) -> None:
        rollout, scores = outcome.rollout, outcome.scores
        prompt_tokens = int(np.sum(multihost(outcome.prompts.student.lengths)))
        tokens, lengths = local_rows(rollout.tokens), local_rows(rollout.lengths)
        seconds = outcome.seconds
        response_tokens = int(np.sum(multihost(rollout.lengths)))
        row = {
            "step": outcome.step,
            "phase": outcome.phase,
            **{name: float(value) for name, value in outcome.metrics.items()},
            "repetition": repetition(tokens, lengths),
            "prompt_tokens": prompt_tokens,
            "response_tokens": response_tokens,
            "seconds": seconds,
            "tokens_per_second": response_tokens / sum(seconds.values()),
            "memory_gib": memory_gib(),
        }
        self.record(row, self._samples(outcome, tokens, lengths))
