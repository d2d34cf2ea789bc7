"""Statistics of a step, for metrics.jsonl. Gaps are `log teacher - log student`, in nats."""

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.rollout.masks import row_mean, token_mean
from camopd_jax.types import Batch


def step_statistics(batch: Batch) -> dict[str, jax.Array]:
    """Scalars of one batch. Means over tokens include the answers that were not selected."""
    rollout, log_probs, selection = batch.rollout, batch.log_probs, batch.selection
    gap_BT = log_probs.gap
    lengths_B = rollout.lengths.astype(jnp.float32)
    total = jnp.sum(selection.mass)
    return {
        "gap_mean": token_mean(gap_BT, rollout.lengths),
        "gap_abs_mean": token_mean(jnp.abs(gap_BT), rollout.lengths),
        "gap_pos_mean": token_mean(jnp.maximum(gap_BT, 0), rollout.lengths),
        "selected_fraction": jnp.mean(selection.weights),
        "selected_mass": jnp.where(total > 0, jnp.sum(selection.mass * selection.weights) / total, 1.0),
        "selected_length_mean": jnp.sum(lengths_B * selection.weights) / jnp.maximum(jnp.sum(selection.weights), 1),
        "length_mean": jnp.mean(lengths_B),
        "truncated_fraction": jnp.mean(~rollout.stopped),
        "entropy": jnp.mean(rollout.entropy),
        "sampler_gap": token_mean(jnp.abs(log_probs.student - rollout.log_probs), rollout.lengths),
        "prompt_tokens": jnp.sum(batch.prompts.lengths),
        "response_tokens": jnp.sum(rollout.lengths),
    }


def answer_table(batch: Batch) -> dict[str, jax.Array]:
    """Columns of shape `[B]` for a line of selection.jsonl. "score" is the gap mass; losses are in nats per token."""
    rollout, log_probs, selection = batch.rollout, batch.log_probs, batch.selection
    return {
        "index": batch.index,
        "score": selection.mass,
        "selected": selection.weights > 0,
        "length": rollout.lengths,
        "truncated": ~rollout.stopped,
        "entropy": rollout.entropy,
        "student_loss": -row_mean(log_probs.student, rollout.lengths),
        "teacher_loss": -row_mean(log_probs.teacher, rollout.lengths),
    }


def repetition(tokens_BT: np.ndarray, lengths_B: np.ndarray, n: int = 4) -> float:
    """Share of an answer's n-grams that occurred earlier in it, mean over the answers with an n-gram. Runs on the host.

    >>> repetition(np.array([[1, 2, 3, 4, 1, 2, 3, 4]]), np.array([8]))
    0.2
    """
    shares = []
    for row, length in zip(tokens_BT, lengths_B, strict=True):
        grams = [tuple(row[i : i + n].tolist()) for i in range(length - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else 0.0
