"""Answers prompts with a model: one JSON object a line in, the same object with the answer out.

    python -m camopd_jax.generate --model=HF_DIR --input=prompts.jsonl --output=answers.jsonl
    python -m camopd_jax.generate --model=HF_DIR --input=prompts.jsonl --output=answers.jsonl \\
        --temperature=0.7 --top_p=0.95 --seed=1 --max_new_tokens=512

In:  {"messages": [...]} (chat template, generation prompt), or {"prompt": "text"} (tokenised as the
     tokenizer does by default), or {"prompt_ids": [...]}.
Out: the same object with "response", "response_ids", "logprobs" (natural log, one per response id, of
     the model's own distribution at temperature 1 whatever the sampling) and "finish_reason" ("stop" or
     "length"). A closing EOS is one of the response ids.

A row's answer depends on the seed, its line and its text, not on the batch.
"""

from absl import flags

from camopd_jax import cli, engine
from camopd_jax.config import Compute, Template
from camopd_jax.data import sources, templates
from camopd_jax.jsonl import write_jsonl
from camopd_jax.sharding import check_rows, make_mesh
from camopd_jax.steps.sampling import Sampling

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder or hub name.")
_INPUT = flags.DEFINE_string("input", None, "JSONL file of prompts.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.")
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer in tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0: greedy.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k likeliest tokens; 0: off.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens with this share; 1: off.", 0.0, 1.0)
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Drop tokens below this share of the likeliest one; 0: off.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_SYSTEM = flags.DEFINE_string("system", None, "System prompt for conversations without one.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Rows answered together.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of weights and products.")


def main() -> None:
    model, source, output = cli.required("model", "HF_DIR"), cli.required("input", "x.jsonl"), cli.required("output", "y.jsonl")
    engine.start()
    mesh = make_mesh()
    check_rows(mesh, "--batch_size", _BATCH.value)
    compute = Compute(teacher=_DTYPE.value, matmul=_DTYPE.value)
    rows = sources.read_jsonl(source)
    folder = engine.find(model, "--model")
    tokenizer = templates.load_tokenizer(folder)
    prompts = [templates.prompt_ids(tokenizer, row, Template(system=_SYSTEM.value)) for row in rows]
    loaded = engine.load(folder, mesh, compute, dtype=engine.teacher_dtype(compute),
                         context=max(map(len, prompts)) + _MAX_NEW.value)
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value)
    answers = engine.answer(loaded, prompts, max_new=_MAX_NEW.value, batch_size=_BATCH.value, sampling=sampling,
                            seed=_SEED.value)
    write_jsonl(output, (
        row | {"response": a.text, "response_ids": a.ids, "logprobs": a.logprobs,
               "finish_reason": "stop" if a.stopped else "length"}
        for row, a in zip(rows, answers, strict=True)
    ))


if __name__ == "__main__":
    cli.run(main)
