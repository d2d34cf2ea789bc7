"""Eq 9 as weights on log-probabilities.

The sampled-token policy gradient and supervised cross-entropy are both `-sum_t weight_t log pi(y_t)`: this
module makes the weights of the former. All of them are constants to the gradient.
"""

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import Method, Phase
from camopd_jax.rollout.masks import length_mask
from camopd_jax.types import Rollout, Scores, Selection


def advantage(scores: Scores, scale: float, clip: float | None) -> jax.Array:
    """`r A_t`, with `A_t = log pi_T(y_t) - log pi_theta(y_t)` (Eq 1), clipped to +-clip before the scale r."""
    gap_BT = scores.teacher - scores.student
    return scale * (gap_BT if clip is None else jnp.clip(gap_BT, -clip, clip))


def importance(scores: Scores, rollout: Rollout, gate: tuple[float, float] | None) -> jax.Array:
    """`w_t = pi_theta(y_t) / mu(y_t)` where it lies inside the gate, else 0 (MiMo-V2-Flash Eq 8); no gate: 1."""
    if gate is None:
        return jnp.ones_like(scores.student)
    ratio_BT = jnp.exp(scores.student - rollout.log_probs)
    return jnp.where((ratio_BT >= gate[0]) & (ratio_BT <= gate[1]), ratio_BT, 0)


def token_weights(scores: Scores, rollout: Rollout, selection: Selection, method: Method, phase: Phase) -> jax.Array:
    """The weight of each token's log-probability in the loss, float32[B, T].

    Eq 9: `L = -1/|S| sum_{i in S} 1/T_i sum_t w_t (r A_t) log pi_theta(y_{i,t})`. With `method.normalise ==
    "token"` the sum over all selected tokens is divided by their number instead. With `method.answers == "teacher"`
    `r` stands for `r A_t`: plain cross-entropy on what the teacher said.
    """
    mask_BT = length_mask(rollout.lengths, rollout.tokens.shape[1])
    if method.answers == "student":
        pull_BT = advantage(scores, phase.scale, method.advantage_clip)
        weight_BT = importance(scores, rollout, method.importance_gate) * pull_BT
    else:
        weight_BT = jnp.full_like(scores.teacher, phase.scale)
    if method.normalise == "sequence":
        share_B = selection.weights / (selection.count * jnp.maximum(rollout.lengths, 1))
    else:
        share_B = selection.weights / jnp.maximum(jnp.sum(selection.weights * rollout.lengths), 1)
    chosen_BT = mask_BT & (selection.weights > 0)[:, None]
    return jax.lax.stop_gradient(jnp.where(chosen_BT, weight_BT * share_B[:, None], 0))
