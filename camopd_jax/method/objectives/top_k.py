"""Divergences on the K most likely tokens of one model; the other V - K tokens are left out or form one bin.

With S the student's distribution, T the teacher's, and K a set of tokens:

    teacher_top_k    KL(S_K || T_K): K is the teacher's, and both are renormalised inside it (arXiv 2603.25562)
    corrected_top_k  sum_K (S log(S / T) - S + T): K is the teacher's; least where S = T in K (arXiv 2606.30406, Eq 5)
    binned_top_k     KL over K + 1 outcomes, the last of which is any other token; K is the teacher's; either direction
    tide_deficit     sum_K T_K log(T_K / S): K is the teacher's, and only the teacher is renormalised (arXiv 2608.09836)
    student_top_k    KL(S_K || T_K): K is the student's (arXiv 2604.13016)
    selectkd         the sampled token's loss, where the teacher's K has the student's likeliest (arXiv 2510.24021)

The plain truncated sum `sum_K S log(S / T)` is refused: its gradient is not 0 where S = T, but moves probability out of
K, to the tokens that are least likely for the teacher.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from camopd_jax.errors import UserError
from camopd_jax.method.objectives.base import Objective
from camopd_jax.method.objectives.full_vocabulary import kl
from camopd_jax.method.objectives.sampled_token import SampledToken
from camopd_jax.types import Record

TRUNCATED = (
    "sums over the top K only, so its gradient moves probability to tokens outside it, even where both models agree; "
    "give teacher_top_k (renormalised), corrected_top_k or binned_top_k (docs/objectives.md)"
)


@dataclass(frozen=True)
class _TopK(Objective):
    """`k` is the number of tokens; a vocabulary with fewer is used in full."""

    k: int = 16

    def __post_init__(self) -> None:
        check_k(self.k)


@dataclass(frozen=True)
class _TeacherTopK(_TopK):
    """Stores the teacher's K tokens: "top_ids" int32[..., K] and "top_log_probs" float32[..., K], most likely first."""

    def read(self, logits: jax.Array, targets: Record) -> Record:
        log_probs, ids = top_k(jax.nn.log_softmax(logits, axis=-1), self.k)
        return {"top_ids": ids, "top_log_probs": log_probs}


@dataclass(frozen=True)
class TeacherTopK(_TeacherTopK):
    """Reverse KL with both distributions renormalised inside the teacher's top K; no gradient outside it.

    It does not see what the student does outside the set, so its authors sample answers with `rollout.top_p` 0.9.
    """

    k: int = 32

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        ids, teacher = _constants(targets)
        return kl(jax.nn.log_softmax(_at(logits, ids), axis=-1), jax.nn.log_softmax(teacher, axis=-1))


@dataclass(frozen=True)
class CorrectedTopK(_TeacherTopK):
    """Reverse KL on the teacher's top K with the mass correction of MOPD."""

    k: int = 64

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        ids, teacher = _constants(targets)
        student = _log_probs_at(logits, ids)
        return kl(student, teacher) + jnp.sum(jnp.exp(teacher) - jnp.exp(student), axis=-1)


@dataclass(frozen=True)
class BinnedTopK(_TeacherTopK):
    """KL over the teacher's top K and one bin for all other tokens: `reverse` KL(S || T) or `forward` KL(T || S).

    Stores the log of the teacher's probability of the bin too, as "rest" float32[...].
    """

    direction: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("reverse", "forward"):
            raise UserError(f"direction is {self.direction!r}; give 'reverse' or 'forward'")

    def read(self, logits: jax.Array, targets: Record) -> Record:
        record = super().read(logits, targets)
        return record | {"rest": _log_rest(logits, record["top_ids"])}

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        ids, teacher = _constants(targets)
        student = _log_probs_at(logits, ids)
        if ids.shape[-1] < logits.shape[-1]:  # else the bin is empty
            rest = jax.lax.stop_gradient(targets["rest"])
            teacher = jnp.concatenate([teacher, rest[..., None]], axis=-1)
            student = jnp.concatenate([student, _log_rest(logits, ids)[..., None]], axis=-1)
        return kl(student, teacher) if self.direction == "reverse" else kl(teacher, student)


@dataclass(frozen=True)
class TideDeficit(_TeacherTopK):
    """Forward KL from the teacher, renormalised inside its top K, to the student, which is not.

    It is the forward KL inside the set plus `-log` of the student's probability of the set.
    """

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        ids, teacher = _constants(targets)
        return kl(jax.nn.log_softmax(teacher, axis=-1), _log_probs_at(logits, ids))


@dataclass(frozen=True)
class StudentTopK(_TopK):
    """Reverse KL with both distributions renormalised inside the student's own top K.

    The set is that of the student when the gradient is computed, so the teacher's logits are computed with it.
    """

    teacher_logits: ClassVar[bool] = True

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        ids = top_k(jax.lax.stop_gradient(logits), self.k)[1]
        teacher = _at(jax.lax.stop_gradient(targets["teacher_logits"]), ids)
        return kl(jax.nn.log_softmax(_at(logits, ids), axis=-1), jax.nn.log_softmax(teacher, axis=-1))


@dataclass(frozen=True)
class SelecTKD(SampledToken):
    """The sampled token's loss where the teacher accepts the student: its top K has the student's most likely token.

    Other tokens have the factor `rejected` instead of 1.
    """

    k: int = 5
    rejected: float = 0.0

    def __post_init__(self) -> None:
        check_k(self.k)
        if not 0 <= self.rejected <= 1:
            raise UserError(f"rejected is {self.rejected!r}; give a factor between 0 and 1")

    def read(self, logits: jax.Array, targets: Record) -> Record:
        return {"top_ids": top_k(logits, self.k)[1]}

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        best = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
        accepted = jnp.any(targets["top_ids"] == best[..., None], axis=-1)
        return jnp.where(accepted, 1.0, self.rejected) * super().loss(logits, targets)


def check_k(k: int) -> None:
    """Raises UserError unless k is a number of tokens."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UserError(f"k is {k!r}; give a number of tokens, at least 1")


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values [..., k] over the last axis in descending order, and their indices; all if there are fewer.

    Of equal values, the first ones.
    """
    values, ids = jax.lax.top_k(values, min(k, values.shape[-1]))
    return values, ids


def _constants(targets: Record) -> tuple[jax.Array, jax.Array]:
    """The teacher's K tokens and their log-probabilities."""
    return targets["top_ids"], jax.lax.stop_gradient(targets["top_log_probs"])


def _at(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids, axis=-1)


def _log_probs_at(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """`log softmax(logits)` of these tokens, float32[..., K]."""
    return _at(logits, ids) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _log_rest(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The log of the probability of all other tokens, float32[...]; not from `1 - sum`, which rounds to 0."""
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
