"""Times rollouts that the student samples alone, and together with a teacher (`config.rollout.sampler`).

    python benchmarks/samplers.py --rounds=9

The quickstart's specialist is the student, its generalist the teacher. All samplers alternate; prints
medians, least and most seconds. The prompts are random, and all answers have the same length.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from camopd_jax.config.schema import Compute, RolloutConfig
from camopd_jax.inference.loading import load
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.paired import Pair, PairedPrompts
from camopd_jax.rollout.sampling import row_keys, sampling_of
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.runtime.start import start
from camopd_jax.types import Prompts

flags.DEFINE_integer("batch", 64, "Prompts.")
flags.DEFINE_integer("cap", 32, "Tokens of every answer.")
flags.DEFINE_integer("rounds", 9, "Rounds of alternation, after one that compiles.")
FILES = Path(__file__).parents[1] / "examples" / "quickstart"


def main(_) -> None:
    start()
    v = flags.FLAGS
    mesh = make_mesh(1, devices=jax.devices()[:1])
    student, teacher = (
        load(FILES / name, mesh, Compute(), dtype="float32", context=16 + v.cap)
        for name in ("specialist", "generalist")
    )
    vocab = student.model.config.vocab_size
    words = np.random.default_rng(0).integers(0, vocab, (v.batch, 16)).astype(np.int32)
    prompts = Prompts(jnp.asarray(words), jnp.full(v.batch, 16, jnp.int32))
    pair, both = Pair(student.model, teacher.model), PairedPrompts(prompts, prompts)
    params = generate.for_decoding(pair, (student.params, teacher.params))
    keys = row_keys(0, jnp.int32(0), jnp.arange(v.batch))
    settings = RolloutConfig()
    samplers = {
        "student": settings,
        "mixed": dataclasses.replace(settings, sampler="mixed"),
        "speculative": dataclasses.replace(settings, sampler="speculative", temperature=0.5, top_p=0.5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for number in range(v.rounds + 1):
        for name, of in samplers.items():
            how = Decode(sampling_of(of), (), v.cap)  # no token ends an answer
            model, weights, read = (student.model, params[0], prompts) if name == "student" else (pair, params, both)
            started = time.perf_counter()
            jax.block_until_ready(generate.answers(model, weights, read, keys, how).tokens)
            if number:
                seconds[name].append(time.perf_counter() - started)
    print(json.dumps({
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}", "batch": v.batch, "cap": v.cap,
        "seconds": {name: [round(f(s), 4) for f in (statistics.median, min, max)] for name, s in seconds.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    app.run(main)
