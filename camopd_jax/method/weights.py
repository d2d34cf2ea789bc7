"""The constant weight of each token's loss: all factors of Eq 9 except the objective's loss.

    L = 1/|S| sum_{i in S} 1/T_i sum_t w_t r c_t loss_t

with |S| the number of selected answers, T_i the length of answer i, w_t the importance weight of a token, r the
branch's scale, c_t the objective's coefficient (for the sampled-token objective, the advantage A_t), as changed by the
branch's token weights, and loss_t the objective's loss.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import Method
from camopd_jax.method.objectives.base import Objective
from camopd_jax.method.token_weights import TokenWeight
from camopd_jax.method.tokens import Tokens
from camopd_jax.rollout.masks import length_mask
from camopd_jax.types import Batch, LogProbs, Record, Rollout


def importance(log_probs: LogProbs, rollout: Rollout, gate: tuple[float, float] | None) -> jax.Array:
    """`w_t = pi_theta(y_t) / mu(y_t)` if it is within the gate, else 0 (MiMo-V2-Flash Eq 8); gate None: 1."""
    if gate is None:
        return jnp.ones_like(log_probs.student)
    ratio_BT = jnp.exp(log_probs.student - rollout.log_probs)
    return jnp.where((ratio_BT >= gate[0]) & (ratio_BT <= gate[1]), ratio_BT, 0)


def selected_tokens(batch: Batch) -> jax.Array:
    """bool[B, T], the tokens of the selected answers."""
    rollout = batch.rollout
    return length_mask(rollout.lengths, rollout.tokens.shape[1]) & (batch.selection.weights > 0)[:, None]


def token_weights(
    batch: Batch,
    method: Method,
    objective: Objective,
    scale: float,
    changes: Sequence[TokenWeight] = (),
    keys: jax.Array | None = None,
) -> jax.Array:
    """The weight of each token's loss, float32[B, T]; 0 outside the selected answers.

    With `method.normalise == "token"`, the sum over all selected tokens is divided by their number, instead of the two
    means.

    Args:
      changes: the branch's token weights, in their order; the batch has the teacher's values that they read.
      keys: a random key for each row, for `changes` that are random.
    """
    rollout, selection = batch.rollout, batch.selection
    own_BT = objective.coefficient(batch.log_probs, method.advantage_clip)
    tokens = _tokens(batch, keys)
    for change in changes:
        own_BT = change.apply(own_BT, tokens)
    weight_BT = importance(batch.log_probs, rollout, method.importance_gate) * (scale * own_BT)
    if method.normalise == "sequence":
        share_B = selection.weights / (selection.count * jnp.maximum(rollout.lengths, 1))
    else:
        share_B = selection.weights / jnp.maximum(jnp.sum(selection.weights * rollout.lengths), 1)
    return jax.lax.stop_gradient(jnp.where(tokens.trained, weight_BT * share_B[:, None], 0))


def _tokens(batch: Batch, keys: jax.Array | None) -> Tokens:
    rollout = batch.rollout
    return Tokens(rollout.tokens, selected_tokens(batch), rollout.lengths, batch.log_probs, batch.teacher.tokens, keys)


def loss_record(batch: Batch, objective: Objective, state: Record | None = None) -> Record:
    """The constants of each token that an objective's loss reads: arrays [B, T, ...] by name.

    Args:
      state: of the objective, in the train state; None or {}: its initial one.
    """
    own = objective.constants(batch.log_probs, batch.rollout)
    compared = objective.compare(_tokens(batch, None), state or objective.initial_state())
    return batch.teacher.tokens | jax.lax.stop_gradient(own | compared)


def cross_entropy_weights(lengths_B: jax.Array, slots: int) -> jax.Array:
    """The weights of supervised fine-tuning: the loss is the mean over the batch's answer tokens."""
    return length_mask(lengths_B, slots) / jnp.sum(lengths_B).astype(jnp.float32)
