"""Log-probabilities of given answers under a model: reads rows, and writes them as JSON lines.

    python -m camopd_jax.score --model=HF_DIR --input=answers.jsonl --output=scores.jsonl

In:  a prompt as for camopd_jax.generate, and "response": "text" (tokenised without special tokens and
     without a final EOS) or "response_ids": [...].
Out: the same object with "response", "response_ids" and "logprobs" (natural log, float32, one per
     response id, at --temperature).
"""

from absl import flags

from camopd_jax.inference.files import FileJob, score_file
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or hub name.")
    flags.DEFINE_string("input", None, "File of prompts with responses: JSON, CSV or parquet (docs/inputs.md).")
    flags.DEFINE_string("output", None, "JSONL file to write.")
    flags.DEFINE_float("temperature", 1.0, "Logits are divided by this.", lower_bound=1e-6)
    flags.DEFINE_string("system", None, "System prompt for conversations without one.")
    flags.DEFINE_integer("batch_size", 16, "Rows scored at one time.", lower_bound=1)
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
        start(cli.processes())
        score_file(job, values.temperature)
        if is_primary():
            print(f"written: {job.output}")

    cli.run(main)
