"""Compares our greedy answers with those of transformers on torch: texts and scores should be the same.

    python benchmarks/parity.py --config=configs/smollm2.py --model=HF_DIR --questions=50

Both answer the first questions of every benchmark of the config that samples answers, in float32. If two answers
differ, their first different token has to be a tie: transformers' logits for the two tokens are closer than --tie.
Prints a line of JSON per benchmark; the exit code is 1 if there is any other difference. Needs torch, like the tests.
"""

import json
import time

import jax
import numpy as np
import torch
import transformers
from absl import flags

from camopd_jax.config.schema import Compute, SftConfig, TrainConfig
from camopd_jax.evals import questions, tasks
from camopd_jax.inference import loading
from camopd_jax.inference.answer import answer
from camopd_jax.runtime import cli
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.runtime.start import start

flags.DEFINE_string("model", None, "Hugging Face folder.")
flags.DEFINE_integer("questions", 50, "The first questions of each benchmark.", 1)
flags.DEFINE_integer("tokens", None, "Cap of an answer; default: the benchmark's.")
flags.DEFINE_float("tie", 1e-3, "Difference of two logits up to which they count as equal.")


def answer_with_torch(model, prompt: list[int], eos_ids: tuple[int, ...], max_new: int) -> list[int]:
    """Greedy, one prompt at a time; a closing EOS is part of the answer."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new,
                             eos_token_id=list(eos_ids), pad_token_id=eos_ids[0])  # fmt: skip
    return out[0, len(prompt) :].tolist()


def logit_difference(model, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """Of the first token in which two answers differ: how far apart torch holds the two."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return float("inf")  # one is the other's beginning: no tie explains it
    with torch.no_grad():
        logits = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
    return abs(float(logits[theirs[at]] - logits[ours[at]]))


def compare(benchmark, loaded, model, config) -> dict:
    values = flags.FLAGS
    task = tasks.find(benchmark, config.evaluation.judge)
    rows = questions.read_questions(benchmark, task, values.questions)
    prompts = questions.prompts(benchmark, task, loaded.reader, rows)
    cap = values.tokens or benchmark.max_response_tokens
    started = time.perf_counter()
    ours = answer(loaded, prompts, max_new=cap, batch_size=config.evaluation.batch_size)
    middle = time.perf_counter()
    theirs = [answer_with_torch(model, prompt, loaded.eos_ids, cap) for prompt in prompts]
    ended = time.perf_counter()
    different = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.ids != b]
    gaps = [logit_difference(model, prompts[i], ours[i].ids, theirs[i]) for i in different]
    texts = [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in theirs]
    scores = [[task.grade(text, row).value for text, (row, _) in zip(said, rows, strict=True)]
              for said in ([answer.text for answer in ours], texts)]  # fmt: skip
    return {
        "benchmark": benchmark.name,
        "questions": len(rows),
        "cap": cap,
        "same_tokens": len(rows) - len(different),
        "ties": sum(gap <= values.tie for gap in gaps),
        "largest_tie": max(gaps, default=0.0),
        "score_ours": float(np.mean(scores[0])),
        "score_transformers": float(np.mean(scores[1])),
        "answers_graded_otherwise": int(np.sum(np.not_equal(*scores))),
        "seconds_ours": round(middle - started, 1),
        "seconds_transformers": round(ended - middle, 1),
    }


if __name__ == "__main__":
    read_config = cli.config_flag(TrainConfig, SftConfig)

    def main() -> None:
        config = read_config()
        start()
        folder = loading.find(cli.required("model", "HF_DIR"), "--model")
        loaded = loading.load(folder, make_mesh(), Compute(matmul="float32"), dtype="float32", context=2048)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        sampled = [
            b for b in config.evaluation.benchmarks if not tasks.find(b, config.evaluation.judge).grades_likelihood
        ]
        found = [compare(benchmark, loaded, model, config) for benchmark in sampled]
        for line in found:
            print(json.dumps(line | {"device": jax.devices()[0].device_kind}))
        if any(line["same_tokens"] + line["ties"] < line["questions"] for line in found):
            raise SystemExit(1)

    cli.run(main)
