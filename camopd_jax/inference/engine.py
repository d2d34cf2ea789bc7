"""A Hugging Face checkpoint in memory, ready to answer and to score: what every command shares."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camopd_jax.config.schema import Compute, Sampling
from camopd_jax.data import templates
from camopd_jax.data.pipeline import pad
from camopd_jax.errors import UserError
from camopd_jax.models import hf
from camopd_jax.models.config import ModelConfig, from_hf
from camopd_jax.models.partition import merge
from camopd_jax.models.transformer import Model
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.rollout.score import LogProb, score_batch
from camopd_jax.runtime import heap
from camopd_jax.runtime.buckets import bucket, length_batches, split_by_length
from camopd_jax.runtime.cluster import Processes, join
from camopd_jax.runtime.mesh import gather, global_rows, reshape_mesh, rows_of_process
from camopd_jax.types import Params, Prompts, Sequences

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Answer:
    """One answer. `ids` and `logprobs` (nats, temperature 1) have an entry for a closing EOS too."""

    ids: list[int]
    log_probs: list[float]
    text: str  # decoded, without special tokens
    stopped: bool  # ended by EOS, not by the cap


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    folder: Path
    model: Model
    params: Params
    tokenizer: Any
    eos_ids: tuple[int, ...]

    @property
    def mesh(self) -> Mesh:
        return self.model.mesh

    def with_params(self, params: Params) -> "Loaded":
        """The same model with other weights, all or a part of them: the student in training."""
        return dataclasses.replace(self, params=merge(self.params, params))


# --------------------------------------------------------------------------------- start and load


def start(processes: Processes | None = None) -> None:
    """Joins the other processes where there are any, and keeps compiled programs between runs.

    Args:
      processes: where they meet, as `distributed.join` takes it.
    """
    join(processes)
    heap.return_large_blocks_at_once()
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "camopd_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # The small ones too: a run has dozens, and by default only what took a second is kept.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


CHECKPOINT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # the files of one that are read


def find(name: str, field: str, files: Sequence[str] = CHECKPOINT) -> Path:
    """The folder of a checkpoint: `name` itself, or the hub's copy of it, with these files.

    Raises:
      UserError: if there is neither; `field` names the flag or config field that asked.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{field}: no folder {name}; give a Hugging Face folder or a hub name like Qwen/Qwen3-8B")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise UserError(
            f"{field}: no folder {name}, and the hub does not give it ({type(error).__name__}); "
            "check the name, log in with `hf auth login`, or give a local folder"
        ) from error


def matmul_dtype(compute: Compute, platform: str | None = None) -> str:
    """What "auto" is on a platform; None: the one this process runs on."""
    if compute.matmul != "auto":
        return compute.matmul
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def teacher_dtype(compute: Compute, platform: str | None = None) -> str:
    return compute.teacher if compute.teacher != "auto" else matmul_dtype(compute, platform)


def load(
    folder: Path, mesh: Mesh, compute: Compute, *, dtype: str, context: int, output_vocab_size: int | None = None
) -> Loaded:
    """Reads a checkpoint onto the mesh.

    Args:
      dtype: of the parameters.
      context: the longest sequence of the run in tokens, prompt and answer.
      output_vocab_size: logits are cut to it, where student and teacher pad their vocabularies differently.
    """
    config = model_config(folder, context)
    if output_vocab_size is not None:
        config = dataclasses.replace(config, output_vocab_size=output_vocab_size)
    model = Model(config, mesh=mesh, dtype=matmul_dtype(compute), remat=compute.remat, attention=compute.attention)
    tokenizer = templates.load_tokenizer(folder)
    return Loaded(folder, model, hf.load(folder, config, mesh, dtype), tokenizer, templates.eos_ids(folder, tokenizer))


def model_config(folder: Path, context: int) -> ModelConfig:
    return from_hf(hf.read_config(folder), context=context, where=str(folder / "config.json"))


# ------------------------------------------------------------------------------- answer and score

_keys = jax.jit(row_keys, static_argnums=0)


def answer(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    draw: int = 0,
    rows: Sequence[int] | None = None,
    smallest_bucket: int = 64,
    on_batch: Callable[[dict[int, Answer]], None] = lambda done: None,
) -> list[Answer]:
    """Answers to prompts, in their order. Row i samples with the key of (seed, draw, i), whatever its batch.

    Args:
      rows: the number of each prompt, where they are not 0, 1, 2, ...
      on_batch: called with {row: answer} as batches come in, shortest prompts first.
    """
    answers: dict[int, Answer] = {}
    numbers = np.arange(len(prompts)) if rows is None else np.asarray(rows)
    model = loaded.model.on(reshape_mesh(loaded.mesh, -1, 1, loaded.mesh.shape["tensor"], "config.mesh"))
    params = generate.for_decoding(model, loaded.params)
    decode = Decode(sampling, loaded.eos_ids, max_new)
    for picked in length_batches([len(p) for p in prompts], batch_size):
        batch = _prompts(loaded.mesh, [prompts[i] for i in picked], smallest_bucket)
        row = numbers[picked].astype(np.int32)
        index = global_rows(loaded.mesh, row[rows_of_process(loaded.mesh, len(row))], len(row))
        out = generate.answers(model, params, batch, _keys(seed, np.int32(draw), index), decode)
        tokens, lengths, log_probs, stopped = gather((out.tokens, out.lengths, out.log_probs, out.stopped))
        done = {}
        for number, ids, n, logp, stop in zip(row, tokens, lengths, log_probs, stopped, strict=True):
            text = loaded.tokenizer.decode(ids[:n], skip_special_tokens=True)
            done[int(number)] = Answer(ids[:n].tolist(), logp[:n].tolist(), text, bool(stop))
        answers |= done
        on_batch(done)
    return [answers[int(number)] for number in numbers]


def score_responses(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int,
    temperature: float = 1.0,
    chunk: int = 1024,
    smallest_bucket: int = 64,
    with_top: bool = False,
) -> list[np.ndarray]:
    """Log-probabilities (nats, float32) of each token of the given responses, in their order.

    With `with_top`, rows of two: the token's, and that of the likeliest token in its place.
    """
    results: dict[int, np.ndarray] = {}
    reading = LogProb(temperature, best=with_top)
    for rows in length_batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], batch_size):
        batch = _prompts(loaded.mesh, [prompts[i] for i in rows], smallest_bucket)
        answers = _prompts(loaded.mesh, [responses[i] for i in rows], smallest_bucket)
        sequences = Sequences(batch, answers.tokens, answers.lengths)
        widths = batch.tokens.shape[1], answers.tokens.shape[1]
        lengths = [np.asarray([len(ids[i]) for i in rows]) for ids in (prompts, responses)]
        parts = split_by_length(*lengths, np.arange(len(rows)), len(rows), widths, smallest_bucket)
        record = gather(score_batch(loaded.model, loaded.params, sequences, parts, chunk, reading))
        log_probs = np.stack([record["log_prob"], record["best"]], axis=-1) if with_top else record["log_prob"]
        results |= {int(row): logp[: len(responses[row])] for row, logp in zip(rows, log_probs, strict=True)}
    return [results[i] for i in range(len(prompts))]


def _prompts(mesh: Mesh, ids: Sequence[Sequence[int]], smallest_bucket: int) -> Prompts:
    """Token lists -> a global, right-padded batch."""
    mine = [ids[i] for i in rows_of_process(mesh, len(ids))]
    width = bucket(max(len(row) for row in ids), smallest_bucket)
    lengths = np.asarray([len(row) for row in mine], np.int32)
    return global_rows(mesh, Prompts(pad(mine, width), lengths), len(ids))
