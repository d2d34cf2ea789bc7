"""Times one training step and each of its stages: rollout, score, select, update.

    python benchmarks/step.py --shape=smollm2-135m --batch=16 --prompt=64 --answer=64
    python benchmarks/step.py --model=HF_DIR --batch=64 --answer=512 --mesh=1,8,1 --profile=trace

Every prompt and every answer has exactly the given length (no token ends an answer), so that two
programs on the same flags do the same work. Prints one JSON line: medians after a warm-up step, in seconds.

FLOPs and bytes are counted from the model, not from the compiler: camopd_jax/planning/costs.py says how.
"""

import datetime
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from camopd_jax import __version__, engine, phases
from camopd_jax.config import Compute, Method, Optimizer, Phase, RolloutConfig, Stream, TrainConfig
from camopd_jax.metrics import memory_gib
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.optim import init_state
from camopd_jax.phases import Branch
from camopd_jax.planning.costs import decode_bytes, forward_flops
from camopd_jax.sharding import global_rows, make_mesh
from camopd_jax.types import PromptBatch, Prompts, Scored, Scores

HISTORY = Path(__file__).parent / "history.jsonl"

flags.DEFINE_string("model", None, "Hugging Face folder of the student; default: random weights of --shape.")
flags.DEFINE_string("teacher", None, "Hugging Face folder of the teacher; default: --model.")
flags.DEFINE_enum("shape", "smollm2-135m", list(SHAPES), "Shape of the random weights.")
flags.DEFINE_integer("batch", 16, "Prompts a step.")
flags.DEFINE_integer("prompt", 64, "Tokens of every prompt.")
flags.DEFINE_integer("answer", 64, "Tokens of every answer.")
flags.DEFINE_integer("micro_batch", 8, "Sequences in one forward and backward.")
flags.DEFINE_integer(
    "logits_chunk", Compute().logits_chunk, "Tokens whose logits exist at one time; 0: of 256 MiB.", lower_bound=0
)
flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of matrix products and teachers.")
flags.DEFINE_enum("remat", "block", ["none", "dots", "block"], "What the backward pass computes again.")
flags.DEFINE_float("mass", 0.8, "Share of the gap mass that is trained on; 1: every answer.", 0.01, 1.0)
flags.DEFINE_string("mesh", "-1,1,1", "data,fsdp,tensor.")
flags.DEFINE_integer("steps", 3, "Steps timed, after one that compiles.", lower_bound=1)
flags.DEFINE_bool("record", False, f"Append the line to {HISTORY.name}.")
flags.DEFINE_string("profile", None, "Folder for an XProf trace of one more step.")


def build():
    """(config, student model, student parameters, teacher parameters) on the mesh."""
    values = flags.FLAGS
    mesh = make_mesh(*map(int, values.mesh.split(",")))
    compute = Compute(teacher=values.dtype, matmul=values.dtype, remat=values.remat,
                      logits_chunk=values.logits_chunk)  # fmt: skip
    length = values.prompt + values.answer
    method = Method(recovery=Phase("absolute_gap", values.mass, 2.0))
    config = TrainConfig(
        "general", "specialised", Stream("g"), Stream("d"), method=method, compute=compute,
        rollout=RolloutConfig(batch_size=values.batch, max_prompt_tokens=values.prompt,
                              max_response_tokens=values.answer, smallest_bucket=min(64, values.answer)),
        optimizer=Optimizer(learning_rate=1e-6, micro_batch=values.micro_batch),
    )  # fmt: skip
    shape = hf.read_config(Path(values.model)) if values.model else SHAPES[values.shape]
    model = Model(from_hf(shape, context=length), mesh=mesh, dtype=engine.matmul_dtype(compute), remat=values.remat)
    if values.model:
        student = hf.load(Path(values.model), model.config, mesh, compute.params)
        teacher = hf.load(Path(values.teacher or values.model), model.config, mesh, engine.teacher_dtype(compute))
    else:
        places = shardings(model.config, mesh)
        make = jax.jit(model.init, out_shardings=places)
        student = make(jax.random.key(0))
        cast = jax.jit(partial(jax.tree.map, lambda p: p.astype(engine.teacher_dtype(compute))), out_shardings=places)
        teacher = cast(make(jax.random.key(1)))
    return config, model, student, teacher


def main(_) -> None:
    engine.start()
    values = flags.FLAGS
    config, model, student, teacher = build()
    state = init_state(student, "shared")
    branch = Branch(None, model, teacher)
    before = np.asarray(student["final_norm"]["scale"])
    programs = phases.compile_programs(config, model, (), state)
    random = np.random.default_rng(0)

    def step(state):
        """The same calls as phases.run, each waited for."""
        seconds: dict[str, float] = {}

        def timed(name, call):
            started = time.perf_counter()
            out = jax.block_until_ready(call())
            seconds[name] = time.perf_counter() - started
            return out

        tokens = random.integers(0, model.config.vocab_size, (values.batch, values.prompt)).astype(np.int32)
        host = Prompts(tokens, np.full(values.batch, values.prompt, np.int32))
        prompts = global_rows(
            model.mesh, PromptBatch(host, host, np.arange(values.batch, dtype=np.int32)), values.batch
        )
        draw, params = np.int32(state.step), state.params
        answers = timed("rollout", lambda: phases.ask(config, programs, branch, params, prompts, draw))
        theirs = timed("score_teacher", lambda: phases.score(config, model, teacher, prompts.teacher, answers))
        ours = answers.logprobs
        if not programs.trusts_sampler:
            ours = timed("score_student", lambda: phases.score(config, model, params, prompts.student, answers))
        scores = Scores(ours, theirs)
        selection = timed("select", lambda: programs.select["recovery"](scores, answers.lengths, draw))
        part = Scored(prompts.student, prompts.index, answers, scores, selection)
        gradient = timed("gradient", lambda: phases.gradient(config, programs, "recovery", params, part))
        after, _ = timed("update", lambda: programs.update["recovery"](state, gradient, part))
        return after, seconds, {"selected": int(selection.count), "sampled": int(jnp.sum(answers.lengths))}

    started = time.perf_counter()
    state, _, _ = step(state)
    compiled = time.perf_counter() - started
    all_seconds, selected, sampled = [], [], []
    for _ in range(values.steps):
        state, seconds, done = step(state)
        all_seconds.append(seconds)
        selected.append(done["selected"])
        sampled.append(done["sampled"])
    if values.profile:
        with jax.profiler.trace(values.profile):
            step(state)

    median = {name: statistics.median(s[name] for s in all_seconds) for name in all_seconds[0]}
    total = statistics.median(sum(s.values()) for s in all_seconds)
    c, batch, prompt, answer = model.config, values.batch, values.prompt, values.answer
    length = prompt + answer
    forward = forward_flops(c, batch, 0, length, answer)
    flops = {
        "rollout": forward_flops(c, batch, 0, prompt, 0) + forward_flops(c, batch, prompt, length, answer),
        "score_teacher": forward,
        "gradient": 3 * forward * statistics.median(selected) / batch,
    }
    if "score_student" in median:
        flops["score_student"] = forward
    read = decode_bytes(c, batch, prompt, answer, jnp.dtype(model.dtype).itemsize)
    line = {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "model": Path(values.model).name if values.model else values.shape,
        "batch": batch, "prompt": prompt, "answer": answer, "micro_batch": values.micro_batch, "mesh": values.mesh,
        "dtype": str(model.dtype), "remat": values.remat, "logits_chunk": values.logits_chunk,
        "mass": values.mass, "steps": values.steps,
        "selected": statistics.median(selected),
        "tokens_sampled_per_step": statistics.median(sampled),
        "largest_move": float(np.max(np.abs(np.asarray(state.params["final_norm"]["scale"]) - before))),
        "seconds_per_step": round(total, 4),
        "seconds": {name: round(s, 4) for name, s in median.items()},
        "answer_tokens_per_second": round(batch * answer / total, 1),
        "gflop_per_second": {name: round(f / median[name] / 1e9, 1) for name, f in flops.items()},
        "decode_gb_per_second": round(read / median["rollout"] / 1e9, 2),
        "first_step_seconds": round(compiled, 1),
        "peak_memory_gib": round(memory_gib(), 2),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    if values.record:
        with HISTORY.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    app.run(main)
