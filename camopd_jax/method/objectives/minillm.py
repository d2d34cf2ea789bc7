"""The objective of MiniLLM (arXiv 2306.08543), for answers that the student samples alone or mixed with the teacher."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.errors import UserError
from camopd_jax.method.objectives.full_vocabulary import ReverseKL
from camopd_jax.rollout.masks import length_mask
from camopd_jax.rollout.score import LOG_PROB
from camopd_jax.types import LogProbs, Record, Rollout


@dataclass(frozen=True)
class MiniLLM(ReverseKL):
    """`w_t KL(S || T) - c_t log S(y_t)` with the constants w_t and c_t.

    The first term is the exact gradient of the token's own reward `r_t = log T(y_t) - log S(y_t)`, the second that of
    the rewards after it:

        w_t = S(y_t) / mu(y_t)           mu: the sampler's distribution
        R_t = mean of r_s over s > t     0 at the last token
        c_t = w_t R_t, but 0 where PPO's min(w_t R_t, clip(w_t, 1 - clip, 1 + clip) R_t) is constant

    Rewards are `reward_scale` times r, which is clipped to +- `reward_clip` before. Without `single_step`, there is no
    first term, and R_t includes r_t.
    """

    off_policy: ClassVar[bool] = False
    weighs_importance: ClassVar[bool] = True
    has_constants: ClassVar[bool] = True
    clip: float = 0.2
    reward_clip: float = 100.0
    reward_scale: float = 0.5
    single_step: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise UserError(f"clip is {self.clip!r}; give a number between 0 and 1")
        for name in ("reward_clip", "reward_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)!r}; give a finite number above 0")

    def constants(self, log_probs: LogProbs, rollout: Rollout) -> Record:
        """ "importance" (w) and "long_term" (c), float32[B, T]; 0 in padding."""
        mask_BT = length_mask(rollout.lengths, rollout.log_probs.shape[1])
        rewards_BT = self.reward_scale * jnp.clip(log_probs.gap, -self.reward_clip, self.reward_clip)
        returns_BT = mean_returns(jnp.where(mask_BT, rewards_BT, 0), rollout.lengths)
        if self.single_step:
            returns_BT = jnp.pad(returns_BT[:, 1:], ((0, 0), (0, 1)))
        ratio_BT = jnp.where(mask_BT, jnp.exp(log_probs.student - rollout.log_probs), 0)
        return {"importance": ratio_BT, "long_term": clipped(ratio_BT, returns_BT, self.clip)}

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        long_term = -targets["long_term"] * LOG_PROB(logits, targets)["log_prob"]
        if not self.single_step:
            return long_term
        return targets["importance"] * super().loss(logits, targets) + long_term


def mean_returns(rewards_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The mean of each token's reward and those after it, float32[B, T]; 0 in padding, where rewards must be 0.

    >>> mean_returns(jnp.array([[-1.0, 0.5, -0.2, 0.0]]), jnp.array([3])).round(6)
    Array([[-0.233333,  0.15    , -0.2     ,  0.      ]], dtype=float32)
    """
    sums_BT = jnp.cumsum(rewards_BT[:, ::-1], axis=1)[:, ::-1]
    remaining_BT = lengths_B[:, None] - jnp.arange(rewards_BT.shape[1])[None, :]
    return jnp.where(remaining_BT > 0, sums_BT / jnp.maximum(remaining_BT, 1), 0)


def clipped(ratio: jax.Array, returns: jax.Array, clip: float) -> jax.Array:
    """The factor of `grad log S(y)` in the gradient of PPO's `min(ratio R, clip(ratio, 1 - clip, 1 + clip) R)`.

    That is `ratio R`, but 0 where the ratio has already moved beyond the clip in the direction of R (arXiv 1707.06347).
    """
    inside = jnp.where(returns > 0, ratio <= 1 + clip, ratio >= 1 - clip)
    return jnp.where(inside, ratio * returns, 0)
