"""Divergences between the next-token distributions of both models over the full vocabulary (GKD, arXiv 2306.13649).

With S the student's distribution and T the teacher's:

    reverse_kl   KL(S || T) = sum_v S log(S / T)
    forward_kl   KL(T || S) = sum_v T log(T / S)
    jsd          beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S

The teacher's hidden states are stored, not its logits. Both output heads are applied to one chunk of tokens at a time,
so that memory does not grow with the vocabulary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.errors import UserError
from camopd_jax.method.objectives.base import Objective
from camopd_jax.types import Record


@dataclass(frozen=True)
class _FullVocabulary(Objective):
    teacher_logits: ClassVar[bool] = True

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        student = jax.nn.log_softmax(logits, axis=-1)
        teacher = jax.nn.log_softmax(jax.lax.stop_gradient(targets["teacher_logits"]), axis=-1)
        return self.divergence(student, teacher)

    def divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """The divergence in nats, float32[...]; arguments: log-probabilities, float32[..., V]."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReverseKL(_FullVocabulary):
    """`KL(S || T)`, which the sampled-token objective estimates."""

    def divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        return kl(student, teacher)


@dataclass(frozen=True)
class ForwardKL(_FullVocabulary):
    """`KL(T || S)`: large if the student gives low probability to tokens that are likely for the teacher."""

    def divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        return kl(teacher, student)


@dataclass(frozen=True)
class JSD(_FullVocabulary):
    """The generalised Jensen-Shannon divergence: with `beta` near 0 like forward KL, near 1 like reverse KL."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise UserError(
                f"beta is {self.beta!r}; give a number between 0 and 1 (0 would be forward_kl, 1 reverse_kl)"
            )

    def divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        mixture = jnp.logaddexp(math.log(self.beta) + teacher, math.log1p(-self.beta) + student)
        return self.beta * kl(teacher, mixture) + (1 - self.beta) * kl(student, mixture)


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """`KL(p || q)` in nats over the last axis; p and q are log-probabilities. Tokens with probability 0 in p add 0."""
    probability = jnp.exp(p)
    return jnp.sum(jnp.where(probability > 0, probability * (p - q), 0), axis=-1)
