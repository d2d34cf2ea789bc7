"""Answers prompts with a model: reads rows, and writes them as JSON lines with the answers added.

    python -m camopd_jax.generate --model=HF_DIR --input=prompts.jsonl --output=answers.jsonl
    python -m camopd_jax.generate --model=HF_DIR --input=prompts.jsonl --output=answers.jsonl \\
        --temperature=0.7 --top_p=0.95 --seed=1 --max_new_tokens=512

In:  {"messages": [...]} (rendered by the chat template, with its generation prompt), or {"prompt": "text"}
     (tokenised with the tokenizer's defaults), or {"prompt_ids": [...]}.
Out: the same object with "response", "response_ids", "logprobs" (natural log, one per response id, of
     the unfiltered distribution at temperature 1, whatever the sampling settings) and "finish_reason"
     ("stop" or "length"). A closing EOS is one of the response ids.

A row's answer depends on the seed, its line number and its text, not on the batch. With --answers_per_prompt above 1,
each row is written once for each answer, with the answer's number, from 0, as "answer"; answer 0 is that of 1.
"""

from absl import flags

from camopd_jax.config.build import from_flags
from camopd_jax.config.schema import Sampling
from camopd_jax.inference.files import FileJob, answer_file
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or hub name.")
    flags.DEFINE_string("input", None, "File of prompts: JSON, CSV or parquet (docs/inputs.md).")
    flags.DEFINE_string("output", None, "JSONL file to write.")
    flags.DEFINE_integer("max_new_tokens", 256, "Longest answer in tokens.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0: greedy.", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: off.", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "Sample from the most likely tokens up to this probability; 1: off.", 0.0, 1.0)
    flags.DEFINE_float("min_p", 0.0, "Drop tokens below this share of the highest probability; 0: off.", 0.0, 1.0)
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.", 0, 2**31 - 1)
    flags.DEFINE_integer("answers_per_prompt", 1, "Answers to each row, each in a row of its own.", lower_bound=1)
    flags.DEFINE_string("system", None, "System prompt for conversations without one.")
    flags.DEFINE_integer("batch_size", 16, "Rows answered at one time.", lower_bound=1)
    flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of weights and products.")
    cli.define_processes()

    def main() -> None:
        values = flags.FLAGS
        job = FileJob(
            cli.required("model", "HF_DIR"),
            cli.required("input", "x.jsonl"),
            cli.required("output", "y.jsonl"),
            values.system,
            values.batch_size,
            values.dtype,
        )
        names = ("temperature", "top_k", "top_p", "min_p")
        sampling = from_flags(Sampling, **{name: values[name].value for name in names})
        start(cli.processes())
        answer_file(job, sampling, values.max_new_tokens, values.seed, values.answers_per_prompt)
        if is_primary():
            print(f"written: {job.output}")

    cli.run(main)
