"""Log-probabilities of given responses under a loaded checkpoint, computed as for the teachers in training."""

from collections.abc import Sequence

import numpy as np

from camopd_jax.inference.batches import global_batch
from camopd_jax.inference.loading import Loaded
from camopd_jax.rollout.score import LogProb, score_batch
from camopd_jax.runtime.buckets import length_batches, split_by_length
from camopd_jax.runtime.mesh import gather
from camopd_jax.runtime.progress import work
from camopd_jax.types import Sequences


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
    """Log-probabilities (nats, float32) of the tokens of each response, in the responses' order.

    Args:
      prompts, responses: token ids of each one.
      batch_size: rows scored at a time; data x fsdp of the mesh must divide it.
      temperature: logits are divided by this.
      chunk: tokens per chip whose logits exist at a time.
      smallest_bucket: batches are padded to this times a power of two.
      with_top: whether to return the log-probability of the most likely token too.

    Returns:
      float32[T] for a response of T tokens; with `with_top` float32[T, 2]: the log-probabilities of the token and of
      the most likely token at its position.
    """
    results: dict[int, np.ndarray] = {}
    reading = LogProb(temperature, best=with_top)
    totals = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    with work("scoring", len(prompts), "answers") as scoring:
        for rows in length_batches(totals, batch_size):
            prompt = global_batch(loaded.mesh, [prompts[i] for i in rows], smallest_bucket)
            response = global_batch(loaded.mesh, [responses[i] for i in rows], smallest_bucket)
            parts = split_by_length(
                np.asarray([len(prompts[i]) for i in rows]),
                np.asarray([len(responses[i]) for i in rows]),
                np.arange(len(rows)),
                len(rows),
                (prompt.tokens.shape[1], response.tokens.shape[1]),
                smallest_bucket,
            )
            sequences = Sequences(prompt, response.tokens, response.lengths)
            record = gather(
                score_batch(loaded.model, loaded.params, sequences, parts, chunk, reading, tuned=loaded.tuned)
            )
            log_probs = np.stack([record["log_prob"], record["best"]], axis=-1) if with_top else record["log_prob"]
            results |= {int(row): values[: len(responses[row])] for row, values in zip(rows, log_probs, strict=True)}
            scoring.add(len(set(rows.tolist())))
    return [results[i] for i in range(len(prompts))]
