"""Answers the prompts, or scores the given answers, of a JSONL file with a checkpoint."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from etils import epath

from camopd_jax.config.schema import Compute, Sampling, Template
from camopd_jax.data import sources, templates
from camopd_jax.data.columns import Row
from camopd_jax.data.sources import LocatedRow
from camopd_jax.data.templates import Reader
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.inference.answer import answer
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.log_probs import score_responses
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.jsonl import write_rows
from camopd_jax.runtime.mesh import check_rows, make_mesh
from camopd_jax.runtime.paths import in_home
from camopd_jax.runtime.progress import work


@dataclass(frozen=True)
class FileJob:
    """The values of the flags that `generate` and `score` share."""

    model: str  # Hugging Face folder or hub name
    input: str  # file of rows with a prompt: JSON, or by its name CSV or parquet
    output: str  # JSONL file to write
    system: str | None  # system prompt added to conversations that have none
    batch_size: int  # rows computed at a time
    dtype: Literal["auto", "float32", "bfloat16"]  # of weights and matrix products


def answer_file(job: FileJob, sampling: Sampling, max_new_tokens: int, seed: int, answers_per_prompt: int = 1) -> None:
    """Adds an answer to each row: "response", "response_ids", "logprobs" and "finish_reason". Writes the rows.

    With several answers, each row is written once for each of them, with its number as "answer".

    Args:
      max_new_tokens: maximum length of an answer.
      seed: for sampling; an answer depends only on it, the row number, its own number and the prompt.

    Raises:
      UserError: for a model or rows that cannot be read, and an output that cannot be written.
    """
    if answers_per_prompt > 1 and sampling.temperature == 0:
        raise UserError(
            f"--answers_per_prompt is {answers_per_prompt}, but greedy answers are all the same; give --temperature"
        )
    rows, reader = _read(job)
    prompts = reader.prompts(rows, Template(system=job.system))
    loaded = _load(job, max(map(len, prompts)) + max_new_tokens)
    settings: Any = {"max_new": max_new_tokens, "batch_size": job.batch_size, "sampling": sampling, "seed": seed}
    with work("answering", answers_per_prompt * len(prompts), "prompts") as answering:
        settings["on_batch"] = lambda new: answering.add(len(new))
        draws = [answer(loaded, prompts, draw=number, **settings) for number in range(answers_per_prompt)]
    _write(
        job,
        (
            row
            | {
                "response": given.text,
                "response_ids": given.ids,
                "logprobs": given.log_probs,
                "finish_reason": "stop" if given.stopped else "length",
            }
            | ({"answer": number} if answers_per_prompt > 1 else {})
            for (row, _), *several in zip(rows, *draws, strict=True)
            for number, given in enumerate(several)
        ),
    )


def score_file(job: FileJob, temperature: float) -> None:
    """Adds "response", "response_ids" and "logprobs" of the given response to each row. Writes the rows.

    Args:
      temperature: logits are divided by this.

    Raises:
      UserError: for a model or rows that cannot be read, and an output that cannot be written.
    """
    rows, reader = _read(job)
    prompts = reader.prompts(rows, Template(system=job.system))
    responses = [_response_ids(reader, row, where) for row, where in rows]
    loaded = _load(job, max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)))
    log_probs = score_responses(loaded, prompts, responses, batch_size=job.batch_size, temperature=temperature)
    _write(
        job,
        (
            row
            | {
                "response": row.get("response", reader.tokenizer.decode(ids)),
                "response_ids": list(ids),
                "logprobs": values.tolist(),
            }
            for (row, _), ids, values in zip(rows, responses, log_probs, strict=True)
        ),
    )


def _read(job: FileJob) -> tuple[list[LocatedRow], Reader]:
    """The rows, and the model's tokenizer with the size of its embedding."""
    _check_output(job)
    check_rows(make_mesh(), "--batch_size", job.batch_size)
    rows = sources.read_file(job.input, "--input")
    folder = loading.find(job.model, "--model")
    return rows, Reader(templates.load_tokenizer(folder), loading.model_config(folder, context=1).vocab_size)


def _check_output(job: FileJob) -> None:
    """Finds an output that cannot be written, before the model is loaded."""
    output = epath.Path(job.output)
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; give a file")
    if "://" not in job.output and not output.parent.is_dir():
        raise UserError(f"--output: cannot write {output}, there is no folder {output.parent}; create it")
    if output.exists() and os.path.realpath(job.output) == os.path.realpath(in_home(job.input)):
        raise UserError(f"--output: {output} is the input, which would be lost; give another file")


def _load(job: FileJob, context: int) -> Loaded:
    """Loads the model for sequences of up to `context` tokens."""
    compute = Compute(teacher=job.dtype, matmul=job.dtype)
    folder = loading.find(job.model, "--model")
    return loading.load(folder, make_mesh(), compute, dtype=loading.teacher_dtype(compute), context=context)


def _response_ids(reader: Reader, row: Row, where: str) -> list[int]:
    if "response_ids" not in row and "response" not in row:
        raise UserError(f'{where}: no "response" and no "response_ids"; give one of them in every row')
    with sources.naming(where):
        given = row.get("response_ids")
        return reader.check(templates.tokens(reader.tokenizer, row["response"]) if given is None else given)


def _write(job: FileJob, rows: Iterable[Row]) -> None:
    if is_primary():
        write_rows(job.output, rows)
