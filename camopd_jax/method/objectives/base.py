"""The base class of objectives: the loss of a token, and the teacher's values that it needs.

A branch's loss is `sum_{i,t} weight_{i,t} loss_{i,t}` over its selected answers. The weights are constants: the product
of scale, selection, normalisation, importance (all in `method.weights`) and the objective's `coefficient`, as changed
by the branch's token weights. The loss of a token is a function of the student's logits and of values stored from the
teacher.

An objective with a `second_pass` compares all tokens of the step before the gradient: `read_student` stores values of
the student's logits when it scores its answers, `compare` makes constants of each token from them, and `next_state`
changes the numbers that later steps use.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from camopd_jax.method.tokens import Tokens
from camopd_jax.rollout.score import LOG_PROB
from camopd_jax.types import LanguageModel, LogProbs, Record, Rollout


@dataclass(frozen=True)
class Objective:
    """The fields are the objective's options. Hashable: a static argument of compiled functions."""

    # Whether `targets` of `loss` has the teacher's logits, float32[..., V] as "teacher_logits". They are computed from
    # the teacher's stored hidden states [B, T, D], for one chunk of tokens at a time
    teacher_logits: ClassVar[bool] = False
    # Whether its coefficient is the advantage, which weights may then change (method/token_weights.py)
    has_advantage: ClassVar[bool] = False
    # Whether it is valid for answers that the student did not sample
    off_policy: ClassVar[bool] = True
    # Whether it weighs tokens by the probability of the student over that of the sampler, so that
    # `config.method.importance_gate` must not; such an objective is also valid for answers of a mixture of both models
    weighs_importance: ClassVar[bool] = False
    # Whether it has `constants` or `compare`
    has_constants: ClassVar[bool] = False
    # Whether the student scores its answers before the gradient, for `read_student` and `compare`
    second_pass: ClassVar[bool] = False

    def read(self, logits: jax.Array, targets: Record) -> Record:
        """The teacher's values to store for each token, besides its log-probability: arrays [..., ...] by name.

        Args:
          logits: the teacher's, float32[..., V]. targets: {"tokens": int32[...]}.
        """
        return {}

    def coefficient(self, log_probs: LogProbs, clip: float | None) -> jax.Array:
        """A constant factor on the loss of each token, float32[B, T].

        Args:
          clip: `config.method.advantage_clip`, for objectives whose factor is the advantage.
        """
        return jnp.ones_like(log_probs.teacher)

    def constants(self, log_probs: LogProbs, rollout: Rollout) -> Record:
        """Further constants of each token that `loss` needs, from the scored answers: arrays [B, T] by name."""
        return {}

    def read_student(self, logits: jax.Array, targets: Record) -> Record:
        """The student's values to store for each token before the gradient: arrays [..., ...] by name.

        Args:
          logits: the student's, float32[..., V]. targets: as of `loss`, without constants.
        """
        return {}

    def initial_state(self) -> Record:
        """Numbers by name that `next_state` changes at every update, float32[]; part of the train state."""
        return {}

    def compare(self, tokens: Tokens, state: Record) -> Record:
        """Constants of each token that depend on all tokens of the step: arrays [B, T] by name. With 0, as in the
        slots that fill a chunk, `loss` must be finite.

        Args:
          tokens: with the arrays of `read` and `read_student`. state: as of `initial_state`.
        """
        return {}

    def next_state(self, state: Record, loss: jax.Array) -> Record:
        """The state after an update.

        Args:
          loss: of the branch in this update, float32[].
        """
        return state

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        """The loss of each token in nats, float32[...].

        Args:
          logits: the student's, float32[..., V].
          targets: "tokens" int32[...], the arrays of `read`, `constants` and `compare`, and "teacher_logits" if the
            class needs them; constants.
        """
        raise NotImplementedError


class ReadsTeacher(Protocol):
    """What needs values of the teacher: an objective or a token weight."""

    def read(self, logits: jax.Array, targets: Record) -> Record:
        """As `Objective.read`. Values of the same name are the same."""


@dataclass(frozen=True)
class TeacherReading:
    """Reads a teacher's logits: the token's log-probability, for the gap mass, and the values for the objective and the
    branch's token weights.
    """

    objective: Objective
    weights: tuple[ReadsTeacher, ...] = ()
    teacher: ClassVar[LanguageModel | None] = None

    @property
    def keeps_hidden(self) -> bool:
        return self.objective.teacher_logits

    def __call__(self, logits: jax.Array, targets: Record) -> Record:
        record = LOG_PROB(logits, targets) | self.objective.read(logits, targets)
        for weight in self.weights:
            record |= weight.read(logits, targets)
        return record


@dataclass(frozen=True)
class StudentReading:
    """Reads the student's logits before the gradient: the token's log-probability and an objective's `read_student`."""

    objective: Objective
    teacher: LanguageModel | None = None  # if the objective needs its logits
    keeps_hidden: ClassVar[bool] = False

    def __call__(self, logits: jax.Array, targets: Record) -> Record:
        return LOG_PROB(logits, targets) | self.objective.read_student(logits, targets)
