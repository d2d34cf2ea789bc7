"""Times rollouts and scoring of answers of very different lengths, in each way that avoids waiting for the longest.

    python benchmarks/tails.py --rounds=3

Random weights of a named shape. Every token ends an answer with probability 1 / --mean, so lengths are geometric: most
answers are short, a few long. Rollouts: the full batch until the last answer ends; shrinking (the batch is halved when
half of its answers are complete); or a quarter or half of the batch at a time, where waiting prompts start as answers
end. Scoring of these answers: rows of similar length together, or in their order. All variants alternate and must give
the same answers; prints medians.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from camopd_jax.config.schema import Compute, Sampling
from camopd_jax.inference.loading import matmul_dtype
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.rollout.score import score_batch
from camopd_jax.runtime.buckets import MicroBatch, split_by_length
from camopd_jax.runtime.start import start
from camopd_jax.types import Prompts

flags.DEFINE_enum("shape", "smollm2-135m", list(SHAPES), "Shape of the random weights.")
flags.DEFINE_integer("batch", 32, "Prompts.")
flags.DEFINE_integer("prompt", 32, "Tokens of every prompt.")
flags.DEFINE_integer("mean", 32, "Mean length of the answers.")
flags.DEFINE_integer("cap", 192, "Longest answer.")
flags.DEFINE_integer("size", 8, "Rows scored at one time.")
flags.DEFINE_integer("rounds", 3, "Rounds of alternation, after one that compiles.")


def main(_) -> None:
    start()
    v = flags.FLAGS
    model = Model(from_hf(SHAPES[v.shape], context=v.prompt + v.cap), dtype=matmul_dtype(Compute()))
    params = jax.jit(model.init)(jax.random.key(0))
    weights = generate.for_decoding(model, params)
    words = np.random.default_rng(0).integers(0, model.config.vocab_size, (v.batch, v.prompt)).astype(np.int32)
    prompts = Prompts(jnp.asarray(words), jnp.full(v.batch, v.prompt, jnp.int32))
    keys = row_keys(0, jnp.int32(0), jnp.arange(v.batch))
    ends = tuple(range(model.config.vocab_size // v.mean))

    def rollout(**options):
        decode = Decode(Sampling(), ends, v.cap, **options)
        return lambda: generate.answers(model, weights, prompts, keys, decode)

    answers = rollout()()
    lengths, rows = np.asarray(answers.lengths), np.arange(v.batch)
    widths = v.prompt, v.cap
    full = np.full(v.batch, v.prompt)
    sorted_pieces = list(split_by_length(full, lengths, rows, v.size, widths, 32))
    as_they_come = [
        MicroBatch(np.arange(i, i + v.size, dtype=np.int32), v.prompt + v.cap, v.cap) for i in range(0, v.batch, v.size)
    ]

    def score(parts):
        return lambda: score_batch(model, params, answers.after(prompts), parts, 1024)["log_prob"]

    ways = {
        "rollout: whole batch": rollout(),
        "rollout: shrinking": rollout(shrinks=True),
        "rollout: half at a time": rollout(concurrency=v.batch // 2),
        "rollout: a quarter of it at a time": rollout(concurrency=v.batch // 4),
        "rollout: half at a time, shrinking": rollout(concurrency=v.batch // 2, shrinks=True),
        "score: as they come": score(as_they_come),
        "score: like lengths together": score(sorted_pieces),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = {"rollout": answers.tokens, "score": ways["score: as they come"]()}
    for number in range(v.rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            out = jax.block_until_ready(way())
            took = time.perf_counter() - started
            kind = name.split(":")[0]
            result = out.tokens if kind == "rollout" else out
            if not np.allclose(result, expected[kind], atol=1e-3):
                raise SystemExit(f"{name}: other answers")
            if number:
                seconds[name].append(took)
    print(json.dumps({
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}", "shape": v.shape, "batch": v.batch,
        "prompt": v.prompt, "lengths": sorted(lengths.tolist()), "size": v.size, "rounds": v.rounds,
        "seconds": {name: [round(statistics.median(s), 3), round(min(s), 3), round(max(s), 3)]
                    for name, s in seconds.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    app.run(main)
