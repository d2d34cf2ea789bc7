"""Answers of a loaded checkpoint to any number of prompts, with the sampler of the training rollout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from camopd_jax.config.schema import Sampling
from camopd_jax.inference.batches import global_batch
from camopd_jax.inference.loading import Loaded
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.runtime.buckets import length_batches
from camopd_jax.runtime.mesh import expert_shards, gather, global_rows, reshape_mesh, rows_of_process

GREEDY = Sampling(temperature=0.0)

_keys = jax.jit(row_keys, static_argnums=0)


@dataclass(frozen=True)
class Answer:
    """One answer. `ids` and `log_probs` (nats, temperature 1) include a final EOS."""

    ids: list[int]
    log_probs: list[float]
    text: str  # decoded, without special tokens
    stopped: bool  # True: ended with EOS; False: cut at the maximum length
    entropy: float  # of the next-token distribution in nats, mean over the answer's tokens


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
    on_batch: Callable[[dict[int, Answer]], None] = lambda answers: None,
) -> list[Answer]:
    """Answers prompts; returns the answers in the prompts' order.

    The random key of a row depends only on seed, draw and its row number, not on the batch.

    Args:
      prompts: token ids of each prompt.
      max_new: maximum length of an answer in tokens.
      batch_size: prompts answered at a time; data x fsdp of the mesh must divide it.
      draw: the number of the sample, if the same prompts are answered several times.
      rows: the row number of each prompt; None: 0, 1, 2, ...
      smallest_bucket: batches are padded to this times a power of two.
      on_batch: called with {row number: answer} after each batch; the shortest prompts come first.
    """
    answers: dict[int, Answer] = {}
    numbers = np.arange(len(prompts)) if rows is None else np.asarray(rows)
    tensor, expert = loaded.mesh.shape["tensor"], expert_shards(loaded.mesh)
    model = loaded.model.on(reshape_mesh(loaded.mesh, -1, 1, tensor, "config.mesh", expert))
    params = generate.for_decoding(model, loaded.params)
    decode = Decode(sampling, loaded.eos_ids, max_new, tuned=loaded.tuned)
    for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
        row = numbers[batch].astype(np.int32)
        index = global_rows(loaded.mesh, row[rows_of_process(loaded.mesh, len(row))], len(row))
        tokens = global_batch(loaded.mesh, [prompts[i] for i in batch], smallest_bucket)
        out = generate.answers(model, params, tokens, _keys(seed, np.int32(draw), index), decode)
        arrays = gather((out.tokens, out.lengths, out.log_probs, out.stopped, out.entropy))
        done = {
            int(number): Answer(
                ids[:length].tolist(),
                log_probs[:length].tolist(),
                loaded.tokenizer.decode(ids[:length], skip_special_tokens=True),
                bool(stopped),
                float(entropy),
            )
            for number, ids, length, log_probs, stopped, entropy in zip(row, *arrays, strict=True)
        }
        answers |= done
        on_batch(done)
    return [answers[int(number)] for number in numbers]
