"""The objective of CaMOPD, and of MOPD, GLM-5 and Nemotron: the gap on the sampled token."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.method.objectives.base import Objective
from camopd_jax.rollout.score import LOG_PROB
from camopd_jax.types import LogProbs, Record


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """`-log pi_theta(y_t)`: trains on the answers themselves, sampled by any model."""

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        return -LOG_PROB(logits, targets)["log_prob"]


@dataclass(frozen=True)
class SampledToken(CrossEntropy):
    """`-A_t log pi_theta(y_t)` with the constant advantage `A_t = log pi_T(y_t) - log pi_theta(y_t)` (Eq 1 and 9).

    Its expectation over `y_t ~ pi_theta` has the gradient of `KL(pi_theta || pi_T)` at each prefix. It is the fastest
    objective: it stores only one number per token from the teacher.
    """

    has_advantage: ClassVar[bool] = True
    off_policy: ClassVar[bool] = False

    def coefficient(self, log_probs: LogProbs, clip: float | None) -> jax.Array:
        """The advantage, clipped to +- clip."""
        return log_probs.gap if clip is None else jnp.clip(log_probs.gap, -clip, clip)
