"""Times one training step and each of its stages: rollout, score, select, update.

    python benchmarks/step.py --shape=smollm2-135m --batch=16 --prompt=64 --answer=64
    python benchmarks/step.py --model=HF_DIR --batch=64 --answer=512 --mesh=1,8,1 --profile=trace
    python benchmarks/step.py --model=SPECIALISED --teacher=ORIGINAL --general=general.jsonl --domain=domain.jsonl

Steps are recoveries; with --domain, cycles of three recoveries and a review, whose teacher is the untrained student.
Every prompt and every answer has exactly the given length (no token ends an answer), so that two programs on the same
flags do the same work; with --ends prompts are whole and answers end where the model ends them, as in a run. Prints one
JSON line: of each stage the median after a warm-up, in seconds; with --ends the mean.

FLOPs and bytes are counted from the model, not from the compiler: camopd_jax/planning/costs.py says how. What they are
compared with is published for the device or measured after the steps: benchmarks/limits.py.
"""

import datetime
import itertools
import json
import platform
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from limits import limits
from prompts import tokenised

from camopd_jax import __version__
from camopd_jax.config.schema import Compute, Method, Optimizer, Phase, RolloutConfig, Stream, TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.pipeline import pad
from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.method.loop import Branch
from camopd_jax.method.optimizer import init_state
from camopd_jax.models import hf
from camopd_jax.models.config import ModelConfig, from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.planning.costs import decode_bytes, forward_flops
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.mesh import global_rows, make_mesh
from camopd_jax.runtime.metrics import memory_gib
from camopd_jax.runtime.start import start
from camopd_jax.types import Batch, LogProbs, PromptBatch, Prompts

HISTORY = Path(__file__).parent / "history.jsonl"

flags.DEFINE_string("model", None, "Hugging Face folder of the student; default: random weights of --shape.")
flags.DEFINE_string("teacher", None, "Hugging Face folder of the teacher; default: --model.")
flags.DEFINE_string("general", None, "JSONL file, the last --prompt tokens of whose prompts are asked; default: noise.")
flags.DEFINE_string("domain", None, "The same for reviews; default: none, and no reviews.")
flags.DEFINE_enum("shape", "smollm2-135m", list(SHAPES), "Shape of the random weights.")
flags.DEFINE_integer("batch", 16, "Prompts a step.")
flags.DEFINE_integer("prompt", 64, "Tokens of every prompt.")
flags.DEFINE_integer("answer", 64, "Tokens of every answer.")
flags.DEFINE_bool(
    "ends", False, "Whole prompts of at most --prompt tokens, answers of at most --answer; needs --model."
)
flags.DEFINE_bool("shrinks", False, "Whether half a batch goes on when half of it is done.")
flags.DEFINE_integer("smallest_bucket", 64, "The least width that rows are padded to.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1e-6, "Of the updates: how far the student moves, and so what a review selects.")
flags.DEFINE_integer("micro_batch", 8, "Sequences in one forward and backward.")
flags.DEFINE_integer("score_batch", 0, "Sequences in one forward pass that scores them; 0: --micro_batch.")
flags.DEFINE_integer(
    "logits_chunk", Compute().logits_chunk, "Tokens whose logits exist at one time; 0: of 256 MiB.", lower_bound=0
)
flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of matrix products and teachers.")
flags.DEFINE_enum("teacher_dtype", None, ["float32", "bfloat16"], "Of the teachers' weights; default: --dtype.")
flags.DEFINE_enum("remat", "block", ["none", "dots", "block", "rollout"], "What the backward pass computes again.")
flags.DEFINE_float("mass", 0.8, "Share of the gap mass that is trained on; 1: every answer.", 0.01, 1.0)
flags.DEFINE_string("mesh", "-1,1,1", "data,fsdp,tensor.")
flags.DEFINE_integer("steps", 3, "Steps timed (with --domain: cycles), after those that compile.", lower_bound=1)
flags.DEFINE_integer("warm_up", 1, "Steps (or cycles) that compile.", lower_bound=1)
flags.DEFINE_bool("record", False, f"Append the line to {HISTORY.name}.")
flags.DEFINE_string("profile", None, "Folder for an XProf trace of one more step.")


def build():
    """(config, student model, student parameters, teacher parameters) on the mesh."""
    values = flags.FLAGS
    mesh = make_mesh(*map(int, values.mesh.split(",")))
    compute = Compute(teacher=values.teacher_dtype or values.dtype, matmul=values.dtype, remat=values.remat,
                      logits_chunk=values.logits_chunk)  # fmt: skip
    length = values.prompt + values.answer
    method = Method(recovery=Phase("absolute_gap", values.mass, 2.0), review=Phase("positive_gap", values.mass, 1.0))
    config = TrainConfig(
        "general", "specialised", Stream("g"), Stream("d"), method=method, compute=compute,
        rollout=RolloutConfig(batch_size=values.batch, max_prompt_tokens=values.prompt,
                              max_response_tokens=values.answer, score_batch=values.score_batch,
                              smallest_bucket=min(values.smallest_bucket, values.answer), shrinks=values.shrinks),
        optimizer=Optimizer(learning_rate=values.learning_rate, micro_batch=values.micro_batch),
    )  # fmt: skip
    shape = hf.read_config(Path(values.model)) if values.model else SHAPES[values.shape]
    model = Model(from_hf(shape, context=length), mesh=mesh, dtype=loading.matmul_dtype(compute), remat=values.remat)
    if values.model:
        student = hf.load(Path(values.model), model.config, mesh, compute.params)
        teacher = hf.load(Path(values.teacher or values.model), model.config, mesh, loading.teacher_dtype(compute))
    else:
        places = shardings(model.config, mesh)
        make = jax.jit(model.init, out_shardings=places)
        student = make(jax.random.key(0))
        cast = jax.jit(partial(jax.tree.map, lambda p: p.astype(loading.teacher_dtype(compute))), out_shardings=places)
        teacher = cast(make(jax.random.key(1)))
    return config, model, student, teacher


def questions(file: str | None, vocab: int) -> Iterator[Prompts]:
    """The prompts of one step after the other."""
    values = flags.FLAGS
    rows, slots = values.batch, values.prompt
    if not file:
        random = np.random.default_rng(0)
        while True:
            yield Prompts(random.integers(0, vocab, (rows, slots)).astype(np.int32), np.full(rows, slots, np.int32))
    asked = [ids for _, ids in tokenised(file, values.model, rows)]
    if values.ends:
        fit = itertools.cycle([ids for ids in asked if len(ids) <= slots])
    else:
        fit = itertools.cycle([ids[-slots:] for ids in asked if len(ids) >= slots])
    while True:
        some = list(itertools.islice(fit, rows))
        lengths = np.asarray([len(ids) for ids in some], np.int32)
        yield Prompts(pad(some, min(slots, bucket(int(lengths.max()), values.smallest_bucket))), lengths)


def one_step(config, programs, model, state, phase, branch):
    """(state, {stage: seconds}, {"selected": answers, "sampled": tokens}): `phases.run`'s calls, each waited for."""
    batch, seconds = flags.FLAGS.batch, {}

    def timed(name, call):
        started = time.perf_counter()
        out = jax.block_until_ready(call())
        seconds[name] = time.perf_counter() - started
        return out

    host = next(branch.prompts)
    prompts = global_rows(model.mesh, PromptBatch(host, host, np.arange(batch, dtype=np.int32)), batch)
    draw, params, teacher = np.int32(state.step), state.params, branch.teacher_params
    answers = timed("rollout", lambda: loop.ask(config, programs, branch, params, prompts, draw))
    answers = loop.cut_to_bucket(answers, config.rollout.smallest_bucket)
    theirs = timed("score_teacher", lambda: loop.score(config, model, teacher, prompts.teacher, answers))
    ours = answers.log_probs
    if not programs.trusts_sampler:
        ours = timed("score_student", lambda: loop.score(config, model, params, prompts.student, answers))
    scores = LogProbs(ours, theirs)
    selection = timed("select", lambda: programs.select[phase](scores, answers.lengths, draw))
    part = Batch(prompts.student, prompts.index, answers, scores, selection)
    gradient = timed("gradient", lambda: loop.gradient(config, programs, phase, params, part))
    part = loop.without_residuals(part)
    answers = part.rollout
    after, _ = timed("update", lambda: programs.update[phase](state, gradient, part))
    return after, seconds, {"selected": int(selection.count), "sampled": int(jnp.sum(answers.lengths))}


def counted(c: ModelConfig, seconds: dict[str, float], kept: float, dtype: str) -> dict[str, Any]:
    """What a recovery computes and reads by the second, and what share that is of the most the devices can."""
    v, item = flags.FLAGS, jnp.dtype(dtype).itemsize
    length = v.prompt + v.answer
    forward = forward_flops(c, v.batch, 0, length, v.answer)
    flops = {
        "rollout": forward_flops(c, v.batch, 0, v.prompt, 0) + forward_flops(c, v.batch, v.prompt, length, v.answer),
        "score_teacher": forward,
        "score_student": forward,
        "gradient": 3 * forward * kept / v.batch,
    }
    read = decode_bytes(c, v.batch, v.prompt, v.answer, item)
    speed = {name: f / seconds[name] for name, f in flops.items() if name in seconds}
    reading, most = read / seconds["rollout"], limits(dtype)
    return {
        "gflop_per_second": {name: round(each / 1e9, 1) for name, each in speed.items()},
        "decode_gb_per_second": round(reading / 1e9, 2),
        "limits": {"gflop_per_second": round(most.flops / 1e9), "gb_per_second": round(most.bandwidth / 1e9, 1),
                   "source": most.source},
        "mfu": {name: round(each / most.flops, 3) for name, each in speed.items()},
        "decode_of_bandwidth": round(reading / most.bandwidth, 3),
    }  # fmt: skip


def main(_) -> None:
    start()
    v = flags.FLAGS
    if (v.general or v.domain or v.ends) and not v.model:
        raise app.UsageError("--general, --domain and --ends take a model's tokenizer; give --model")
    config, model, student, teacher = build()
    state = init_state(student, "shared")
    vocab, cycle = model.config.vocab_size, ["recovery"]
    branches = {"recovery": Branch(questions(v.general, vocab), model, teacher)}
    if v.domain:
        own = hf.load(Path(v.model), model.config, model.mesh, loading.teacher_dtype(config.compute))
        branches["review"] = Branch(questions(v.domain, vocab), model, own)
        method = config.method
        cycle = [loop.phase_at(step, method) for step in range(method.recovery_steps + method.review_steps)]
    before = np.asarray(student["final_norm"]["scale"])
    eos_ids = templates.eos_ids(Path(v.model), templates.load_tokenizer(Path(v.model))) if v.ends else ()
    programs = loop.compile_programs(config, model, eos_ids, state)
    middle = statistics.mean if v.ends else statistics.median

    started = time.perf_counter()
    for phase in cycle * v.warm_up:
        state, *_ = one_step(config, programs, model, state, phase, branches[phase])
    compiled = time.perf_counter() - started
    taken: dict[str, list[dict[str, float]]] = {phase: [] for phase in branches}
    selected: dict[str, list[int]] = {phase: [] for phase in branches}
    sampled = []
    for phase in cycle * v.steps:
        state, seconds, done = one_step(config, programs, model, state, phase, branches[phase])
        taken[phase].append(seconds)
        selected[phase].append(done["selected"])
        sampled.append(done["sampled"])
    if v.profile:
        with jax.profiler.trace(v.profile):
            state, *_ = one_step(config, programs, model, state, "recovery", branches["recovery"])

    peak = memory_gib()  # before the limits are measured, which takes memory too
    kept = {phase: statistics.median(counts) for phase, counts in selected.items()}
    stages = {phase: {name: middle([s[name] for s in steps]) for name in steps[0]} for phase, steps in taken.items()}
    whole = {phase: middle([sum(s.values()) for s in steps]) for phase, steps in taken.items()}
    total = statistics.mean(whole[phase] for phase in cycle)
    line = {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "model": Path(v.model).name if v.model else v.shape,
        "batch": v.batch, "prompt": v.prompt, "answer": v.answer, "micro_batch": v.micro_batch,
        "score_batch": loop.score_batch(config), "mesh": v.mesh, "dtype": str(model.dtype),
        "teacher_dtype": loading.teacher_dtype(config.compute), "remat": v.remat, "logits_chunk": v.logits_chunk,
        "mass": v.mass, "ends": v.ends, "shrinks": v.shrinks, "cycle": cycle, "steps": v.steps,
        "selected": kept,
        "tokens_sampled_per_step": middle(sampled),
        "largest_move": float(np.max(np.abs(np.asarray(state.params["final_norm"]["scale"]) - before))),
        "seconds_per_step": round(total, 4),
        "seconds": {phase: {name: round(s, 4) for name, s in of.items()} for phase, of in stages.items()},
        "answer_tokens_per_second": round(middle(sampled) / total, 1),
        **({} if v.ends else counted(model.config, stages["recovery"], kept["recovery"], str(model.dtype))),
        "warm_up_seconds": round(compiled, 1),
        "peak_memory_gib": round(peak, 2),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    if v.record:
        with HISTORY.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    app.run(main)
