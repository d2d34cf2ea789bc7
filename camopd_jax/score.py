"""Log-probabilities of given answers under a model: one JSON object a line in and out.

    python -m camopd_jax.score --model=HF_DIR --input=answers.jsonl --output=scores.jsonl

In:  a prompt as for camopd_jax.generate, and "response": "text" (tokenised without special tokens, no
     EOS added) or "response_ids": [...].
Out: the same object with "response", "response_ids" and "logprobs" (natural log, float32, one per
     response id, temperature 1 unless --temperature says otherwise).
"""

from absl import flags

from camopd_jax.config.schema import Compute, Template
from camopd_jax.data import sources, templates
from camopd_jax.errors import UserError
from camopd_jax.inference import engine
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.jsonl import write_rows
from camopd_jax.runtime.mesh import check_rows, make_mesh


def main() -> None:
    model, source = cli.required("model", "HF_DIR"), cli.required("input", "x.jsonl")
    output = cli.required("output", "y.jsonl")
    values = flags.FLAGS
    engine.start(cli.processes())
    mesh = make_mesh()
    check_rows(mesh, "--batch_size", values.batch_size)
    compute = Compute(teacher=values.dtype, matmul=values.dtype)
    rows = sources.read_jsonl(source)
    folder = engine.find(model, "--model")
    tokenizer = templates.load_tokenizer(folder)
    prompts = [templates.prompt_ids(tokenizer, row, Template(system=values.system)) for row in rows]
    responses = [_response_ids(tokenizer, row, f"{source}:{i + 1}") for i, row in enumerate(rows)]
    context = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    loaded = engine.load(folder, mesh, compute, dtype=engine.teacher_dtype(compute), context=context)
    log_probs = engine.score_responses(
        loaded, prompts, responses, batch_size=values.batch_size, temperature=values.temperature
    )
    if is_primary():
        write_rows(
            output,
            (
                row
                | {
                    "response": row.get("response", tokenizer.decode(ids)),
                    "response_ids": list(ids),
                    "logprobs": logp.tolist(),
                }
                for row, ids, logp in zip(rows, responses, log_probs, strict=True)
            ),
        )


def _response_ids(tokenizer, row: dict, where: str) -> list[int]:
    if "response_ids" in row:
        return row["response_ids"]
    if "response" in row:
        return tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    raise UserError(f'{where}: no "response" and no "response_ids"; give one of them in every row')


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or hub name.")
    flags.DEFINE_string("input", None, "JSONL file of prompts with responses.")
    flags.DEFINE_string("output", None, "JSONL file to write.")
    flags.DEFINE_float("temperature", 1.0, "Logits are divided by this.", lower_bound=1e-6)
    flags.DEFINE_string("system", None, "System prompt for conversations without one.")
    flags.DEFINE_integer("batch_size", 16, "Rows scored together.", lower_bound=1)
    flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of weights and products.")
    cli.define_processes()
    cli.run(main)
