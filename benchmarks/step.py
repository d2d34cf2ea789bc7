"""Times one training step and each of its stages: rollout, score, select, update.

    python benchmarks/step.py --shape=smollm2-135m --batch=16 --prompt=64 --answer=64
    python benchmarks/step.py --model=HF_DIR --batch=64 --answer=512 --mesh=1,8,1 --profile=trace
    python benchmarks/step.py --model=SPECIALISED --teacher=ORIGINAL --general=general.jsonl --domain=domain.jsonl

Steps are recovery steps; with --domain, cycles of three recovery steps and one review step, whose teacher is the
untrained student. Every prompt and every answer has exactly the given length (no token ends an answer), so that runs
with the same flags do the same work. With --ends, prompts are complete and answers end by themselves, as in a run.
Prints one JSON line with the seconds of each stage: medians after a warm-up; with --ends, means.

FLOPs and bytes are counted from the model, not by the compiler: see camopd_jax/planning/costs.py. They are compared
with limits that are published for the device or measured after the steps: benchmarks/limits.py.
"""

import dataclasses
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
from limits import WIDTH, limits
from prompts import tokenised

from camopd_jax import __version__
from camopd_jax.config.schema import (
    AUTO,
    Adapter,
    BranchConfig,
    Compute,
    MeshConfig,
    Optimizer,
    RolloutConfig,
    SelectionConfig,
    TrainConfig,
)
from camopd_jax.data import templates
from camopd_jax.data.pipeline import pad
from camopd_jax.method import schedule
from camopd_jax.method.branches import Branch, Teacher, offload_teachers
from camopd_jax.method.optimizer import init_state
from camopd_jax.method.programs import Programs
from camopd_jax.method.setup import Setup, resolve
from camopd_jax.models import adapters, hf
from camopd_jax.models.config import ModelConfig, from_hf
from camopd_jax.models.partition import trained
from camopd_jax.models.peft_settings import new_settings
from camopd_jax.models.quantised import INT8, LARGEST
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import KERNEL_SCALE, file_rows, in_int8, leaf_of, shardings, tree_of
from camopd_jax.planning.arrays import make_models
from camopd_jax.planning.automatic import choose
from camopd_jax.planning.costs import cache_bytes, forward_flops, matrix_weights
from camopd_jax.planning.memory import device_memory
from camopd_jax.rollout.score import LOG_PROB
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.memory import memory_gib
from camopd_jax.runtime.mesh import global_rows
from camopd_jax.runtime.progress import compilations
from camopd_jax.runtime.start import start
from camopd_jax.types import Batch, LogProbs, Params, PromptBatch, Prompts

HISTORY = Path(__file__).parent / "history.jsonl"

flags.DEFINE_string("model", None, "Hugging Face folder of the student; default: random weights of --shape.")
flags.DEFINE_string("teacher", None, "Hugging Face folder of the teacher; default: --model.")
flags.DEFINE_string("general", None, "JSONL file, the last --prompt tokens of whose prompts are asked; default: noise.")
flags.DEFINE_string("domain", None, "The same for reviews; default: none, and no reviews.")
flags.DEFINE_enum("shape", "smollm2-135m", list(SHAPES), "Shape of the random weights.")
flags.DEFINE_integer("layers", None, "Of the shape, instead of its own number.", lower_bound=1)
flags.DEFINE_integer("batch", 16, "Prompts a step.")
flags.DEFINE_integer("prompt", 64, "Tokens of every prompt.")
flags.DEFINE_integer("answer", 64, "Tokens of every answer.")
flags.DEFINE_bool(
    "ends", False, "Whole prompts of at most --prompt tokens, answers of at most --answer; needs --model."
)
flags.DEFINE_bool("shrinks", False, "Whether half a batch goes on when half of it is done.")
flags.DEFINE_integer("smallest_bucket", 64, "The least width that rows are padded to.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1e-6, "Of the updates: how far the student moves, and so what a review selects.")
flags.DEFINE_integer("micro_batch", 8, "Sequences in one forward and backward; 0: auto.", lower_bound=0)
flags.DEFINE_integer("score_batch", 0, "Sequences in one forward pass that scores them; 0: --micro_batch.")
flags.DEFINE_integer(
    "logits_chunk", Compute().logits_chunk, "Tokens whose logits exist at one time; 0: of 256 MiB.", lower_bound=0
)
flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of matrix products and teachers.")
TEACHER_DTYPES = ["float32", "bfloat16", INT8]
flags.DEFINE_enum("teacher_dtype", None, TEACHER_DTYPES, "Of frozen weights; default: --dtype.")
REMATS = ["none", "dots", "block", "rollout", "auto"]
flags.DEFINE_enum("remat", "block", REMATS, "What the backward pass computes again.")
flags.DEFINE_enum("decode_attention", "xla", ["xla", "fused"], "Attention over the cache.")
flags.DEFINE_enum("offload", "off", ["off", "ahead", "late"], "Whether idle arrays are in host memory.")
flags.DEFINE_float("mass", 0.8, "Share of the gap mass that is trained on; 1: every answer.", 0.01, 1.0)
flags.DEFINE_string("objective", "sampled_token", "Of both branches: a name of camopd_jax/method/objectives.")
flags.DEFINE_string("mesh", "-1,1,1", "data,fsdp,tensor.")
flags.DEFINE_integer(
    "adapter", 0, "Rank of an adapter of all matrices, which alone is trained, on the teacher; 0: none.", lower_bound=0
)
flags.DEFINE_integer("steps", 3, "Steps timed (with --domain: cycles), after those that compile.", lower_bound=1)
flags.DEFINE_integer("warm_up", 1, "Steps (or cycles) that compile.", lower_bound=1)
flags.DEFINE_integer("limits_width", WIDTH, "Of the product that measures an unknown device's limit.", lower_bound=2)
flags.DEFINE_bool("record", False, f"Append the line to {HISTORY.name}.")
flags.DEFINE_string("profile", None, "Folder for an XProf trace of one more step.")


def build():
    """(setup, student and its parameters, teacher and its parameters) on the mesh."""
    values = flags.FLAGS
    compute = Compute(teacher=values.teacher_dtype or values.dtype, matmul=values.dtype, remat=values.remat,
                      logits_chunk=values.logits_chunk, offload=values.offload,
                      decode_attention=values.decode_attention)  # fmt: skip
    length = values.prompt + values.answer
    rules = [SelectionConfig(by, values.mass) for by in ("absolute_gap", "positive_gap")]
    branches = {
        "recovery": BranchConfig(teacher="general", objective=values.objective, selection=rules[0], scale=2.0, steps=3),
        "review": BranchConfig(teacher="specialised", objective=values.objective, selection=rules[1]),
    }
    config = TrainConfig(
        "general", "specialised", branches, compute=compute, mesh=MeshConfig(*map(int, values.mesh.split(","))),
        rollout=RolloutConfig(batch_size=values.batch, max_prompt_tokens=values.prompt,
                              max_response_tokens=values.answer, score_batch=values.score_batch,
                              smallest_bucket=min(values.smallest_bucket, values.answer), shrinks=values.shrinks),
        optimizer=Optimizer(learning_rate=values.learning_rate, micro_batch=values.micro_batch or AUTO),
    )  # fmt: skip
    fields = hf.read_config(Path(values.model)) if values.model else SHAPES[values.shape]
    shape = from_hf(fields | ({"num_hidden_layers": values.layers} if values.layers else {}), context=length)
    models = make_models(config, {"general": shape, "specialised": shape}, {})
    setup = resolve(choose(config, models, None, device_memory()).config)
    model = Model(shape, mesh=setup.mesh, dtype=setup.dtype, remat=setup.config.compute.remat,
                  decode_attention=values.decode_attention)  # fmt: skip
    frozen = dataclasses.replace(model, config=dataclasses.replace(shape, int8=setup.teacher_dtype == INT8))
    if values.model:
        student = hf.load(Path(values.model), model.config, setup.mesh, compute.params)
        teacher = hf.load(Path(values.teacher or values.model), frozen.config, setup.mesh, setup.teacher_dtype)
    else:
        make = jax.jit(model.init, out_shardings=shardings(model.config, setup.mesh))
        student = make(jax.random.key(0))
        teacher = jax.jit(partial(stored, frozen.config, setup), out_shardings=shardings(frozen.config, setup.mesh))(
            make(jax.random.key(1))
        )
    if values.adapter:
        settings = new_settings(Adapter(values.adapter), frozen.config, "")
        adapted = dataclasses.replace(frozen, config=settings.model_config(frozen.config))
        student = adapters.attach(teacher, adapters.init(adapted.config, jax.random.key(2)))
        return setup, adapted, student, frozen, teacher
    return setup, model, student, frozen, teacher


def stored(c: ModelConfig, setup: Setup, params: Params) -> Params:
    """Parameters as a frozen model's are stored: in its dtype, or the layers' matrices in int8 (`models.quantised`)."""
    dtype = setup.dtype if c.int8 else setup.teacher_dtype
    leaves = {row.path: leaf_of(params, row.path).astype(dtype) for row in file_rows(c)}
    for row in filter(in_int8, file_rows(c) if c.int8 else ()):
        kernel = leaf_of(params, row.path)
        inputs = tuple(range(len(row.stack(c.num_layers)), kernel.ndim - row.outputs))
        step = jnp.max(jnp.abs(kernel), inputs, keepdims=True) / LARGEST
        leaves[row.path] = jnp.round(kernel / step).astype(jnp.int8)
        leaves[(*row.path[:-1], KERNEL_SCALE)] = jnp.squeeze(step, inputs)
    return tree_of(leaves)


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


def one_step(programs: Programs, branch: Branch, state):
    """(state, {stage: seconds}, {"selected": answers, "sampled": tokens}): the loop's calls, each waited for."""
    seconds, model, batch = {}, programs.model, flags.FLAGS.batch

    def timed(name, call):
        started = time.perf_counter()
        out = jax.block_until_ready(call())
        seconds[name] = time.perf_counter() - started
        return out

    host = next(branch.prompts)
    prompts = global_rows(model.mesh, PromptBatch(host, host, np.arange(batch, dtype=np.int32)), batch)
    draw = np.int32(state.step)
    answers = timed("rollout", lambda: programs.generate(branch, state, prompts, draw))
    score = partial(programs.score, branch, state, prompts, answers, forward=False)
    log_probs, record = timed("score_teacher", score)
    if not programs.setup.trusts_sampler:
        params, sequences = programs.params(state), answers.after(prompts.student)
        student = timed("score_student", lambda: programs.forward(model, params, sequences, LOG_PROB))["log_prob"]
        log_probs = LogProbs(student, log_probs.teacher)
    selection = timed("select", lambda: programs.select(branch, log_probs, answers, draw))
    batches = {branch.name: Batch(prompts.student, prompts.index, answers, log_probs, selection, record)}
    gradients, batches = timed("gradient", lambda: programs.gradients({branch.name: branch}, state, batches))
    answers = answers.replace(residuals=())  # as a run, which gives them up before the update
    after, _ = timed("update", lambda: programs.update(state, gradients, batches))
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
        "gradient": (2 if v.adapter else 3) * forward * kept / v.batch,  # frozen weights have none of their own
    }
    # The least that decoding reads: weights once a turn, keys and values of the tokens before
    before = (v.prompt + length - 1) * v.answer // 2
    read = item * v.answer * matrix_weights(c) + v.batch * cache_bytes(c, item) * before
    speed = {name: f / seconds[name] for name, f in flops.items() if name in seconds}
    reading, most = read / seconds["rollout"], limits(dtype, v.limits_width)
    return {
        "gflop_per_second": {name: round(each / 1e9, 1) for name, each in speed.items()},
        "decode_gb_per_second": round(reading / 1e9, 2),
        "limits": {"gflop_per_second": round(most.flops / 1e9), "gb_per_second": round(most.bandwidth / 1e9, 1),
                   "source": most.source},
        "mfu": {name: round(each / most.flops, 3) for name, each in speed.items()},
        "decode_of_bandwidth": round(reading / most.bandwidth, 3),
    }  # fmt: skip


def smallest(params):
    """A small array among the trained ones: the final norm's, if there is no adapter."""
    return min(jax.tree.leaves(params), key=np.size)


def main(_) -> None:
    start()
    v = flags.FLAGS
    if (v.general or v.domain or v.ends) and not v.model:
        raise app.UsageError("--general, --domain and --ends take a model's tokenizer; give --model")
    setup, model, student, base, teacher = build()
    config = setup.config
    state = init_state(trained(student, "all"))
    vocab, cycle = model.config.vocab_size, ["recovery"]
    objectives = setup.objectives
    branches = {
        "recovery": Branch("recovery", questions(v.general, vocab), Teacher(base, teacher), objectives["recovery"])
    }
    if v.domain:
        own = hf.load(Path(v.model), base.config, model.mesh, setup.teacher_dtype)
        branches["review"] = Branch("review", questions(v.domain, vocab), Teacher(base, own), objectives["review"])
        cycle = [schedule.phase(config, step) for step in range(4)]
    if config.compute.offloads:
        offload_teachers({branch.teacher for branch in branches.values()}, student)
    before = np.asarray(smallest(state.params))
    eos_ids = templates.eos_ids(Path(v.model), templates.load_tokenizer(Path(v.model))) if v.ends else ()
    programs = Programs(setup, model, student, eos_ids, state, dict.fromkeys(config.branches, base))
    middle = statistics.mean if v.ends else statistics.median

    started = time.perf_counter()
    for phase in cycle * v.warm_up:
        state, *_ = one_step(programs, branches[phase], state)
    compiled, programs_made, from_cache = time.perf_counter() - started, compilations.programs, compilations.cached
    taken: dict[str, list[dict[str, float]]] = {phase: [] for phase in branches}
    selected: dict[str, list[int]] = {phase: [] for phase in branches}
    sampled = []
    for phase in cycle * v.steps:
        state, seconds, done = one_step(programs, branches[phase], state)
        taken[phase].append(seconds)
        selected[phase].append(done["selected"])
        sampled.append(done["sampled"])
    if v.profile:
        with jax.profiler.trace(v.profile):
            state, *_ = one_step(programs, branches["recovery"], state)

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
        "batch": v.batch, "prompt": v.prompt, "answer": v.answer, "micro_batch": setup.micro_batch,
        "score_batch": setup.score_batch, "mesh": v.mesh, "dtype": str(model.dtype),
        "teacher_dtype": setup.teacher_dtype, "remat": config.compute.remat, "offload": v.offload,
        "decode_attention": v.decode_attention, "logits_chunk": v.logits_chunk,
        "mass": v.mass, "objective": v.objective, "ends": v.ends, "shrinks": v.shrinks, "cycle": cycle,
        "adapter": v.adapter, "steps": v.steps,
        "selected": kept,
        "tokens_sampled_per_step": middle(sampled),
        "largest_move": float(np.max(np.abs(np.asarray(smallest(state.params)) - before))),
        "seconds_per_step": round(total, 4),
        "seconds": {phase: {name: round(s, 4) for name, s in of.items()} for phase, of in stages.items()},
        "answer_tokens_per_second": round(middle(sampled) / total, 1),
        **({} if v.ends else counted(model.config, stages["recovery"], kept["recovery"], str(model.dtype))),
        "warm_up_seconds": round(compiled, 1), "programs": programs_made, "programs_in_cache": from_cache,
        "peak_memory_gib": round(peak, 2),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    if v.record:
        with HISTORY.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    app.run(main)
