"""A check of a model before its first use: its log-probabilities are finite, and no row's depend on the others."""

from collections.abc import Sequence

import numpy as np

from camopd_jax.errors import UserError
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.log_probs import score_responses
from camopd_jax.runtime.mesh import batch_shards

ROWS = 4  # sequences of a batch; two batches are scored
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}  # nats: the mean over a sequence's tokens, by dtype of products


def check_log_probs(loaded: Loaded, name: str, sequences: Sequence[Sequence[int]]) -> None:
    """Scores a few sequences twice, each time in other batches.

    Every process of a run has to call it with the same sequences.

    Args:
      name: the field and value that name the model, for error messages.
      sequences: token ids of prompts; those for which the model has no logit are left out.

    Raises:
      UserError: if a log-probability is not finite, or if a sequence has others beside other sequences.
    """
    vocab = loaded.model.config.output_vocab_size or loaded.model.config.vocab_size
    sequences = [kept for ids in sequences if (kept := [i for i in ids if i < vocab])] or [[0]]
    shards = batch_shards(loaded.mesh)
    size = shards * max(1, ROWS // shards)
    several = [sequences[i % len(sequences)] for i in range(2 * size)]
    halves = [
        (ids[: len(ids) // 2], ids[len(ids) // 2 :])
        for ids in (ids if len(ids) > 1 else [*ids, *ids] for ids in several)
    ]
    order = np.arange(2 * size)
    once, again = (_score(loaded, halves, batches) for batches in (order.reshape(2, size), order.reshape(size, 2).T))
    for i, (first, second) in enumerate(zip(once, again, strict=True)):
        if not np.all(np.isfinite(first)):
            raise UserError(
                f"{name}: log-probabilities of this model are not finite in {loaded.model.dtype}; fetch the checkpoint "
                "again, or give another one"
            )
        if np.allclose(first, -np.log(vocab), rtol=0, atol=1e-6):
            raise UserError(
                f"{name}: this model gives every token the same probability, as if its final norm, embedding or head "
                "were 0; fetch the checkpoint again, or give another one"
            )
        difference = float(np.mean(np.abs(first - second)))
        if difference > LARGEST_DIFFERENCE[loaded.model.dtype]:
            raise UserError(
                f"{name}: the log-probabilities of sequence {i} change by {difference:.2g} nats per token when other "
                'sequences are in its batch; give config.compute.attention="xla"'
            )


def _score(loaded: Loaded, halves: list[tuple[Sequence[int], Sequence[int]]], batches: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities of the second half of each sequence after its first.

    Args:
      batches: int[batches, rows], numbers of sequences.
    """
    scores: dict[int, np.ndarray] = {}
    for rows in batches:
        prompts, responses = zip(*(halves[i] for i in rows), strict=True)
        of_rows = score_responses(loaded, prompts, responses, batch_size=len(rows), smallest_bucket=16)
        scores |= dict(zip(rows.tolist(), of_rows, strict=True))
    return [scores[i] for i in range(len(halves))]
