"""What an objective is: what it keeps of the teacher, and the loss of a token.

A branch's loss is `sum_{i,t} weight_{i,t} loss_{i,t}` over its selected answers. The weights are constants that combine
with every objective: scale, selection, normalisation, importance (`method.weights`) and the objective's own
`coefficient`. The loss of a token is a function of the student's logits and of what was kept of the teacher's.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.rollout.score import LOG_PROB
from camopd_jax.types import LogProbs, Record


@dataclass(frozen=True)
class Objective:
    """Options are fields. Hashable: a static argument of compiled functions."""

    # Whether `loss` finds the teacher's logits of every token in its targets, float32[..., V] as "teacher_logits". They
    # are computed from the teacher's hidden states, which wait [B, T, D], a chunk of tokens at a time
    teacher_logits: ClassVar[bool] = False
    # Whether it may learn from answers that the student did not sample itself
    off_policy: ClassVar[bool] = True

    def read(self, logits: jax.Array, targets: Record) -> Record:
        """What is kept of the teacher at each token, beside the token's log-probability: arrays [..., ...] by name.

        Args:
          logits: the teacher's, float32[..., V]. targets: {"tokens": int32[...]}.
        """
        return {}

    def coefficient(self, log_probs: LogProbs, clip: float | None) -> jax.Array:
        """A constant factor on the loss of each token, float32[B, T].

        Args:
          clip: `config.method.advantage_clip`, for those whose factor is the advantage.
        """
        return jnp.ones_like(log_probs.teacher)

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        """The loss of each token in nats, float32[...].

        Args:
          logits: the student's, float32[..., V].
          targets: "tokens" int32[...], what `read` kept, and "teacher_logits" where they are asked for; constants.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TeacherReading:
    """What is read of a teacher: the token's log-probability, which ranks answers, and the objective's own part."""

    objective: Objective

    @property
    def keeps_hidden(self) -> bool:
        return self.objective.teacher_logits

    def __call__(self, logits: jax.Array, targets: Record) -> Record:
        return LOG_PROB(logits, targets) | self.objective.read(logits, targets)
