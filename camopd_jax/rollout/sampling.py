"""Samples the next token. Every row has its own random key.

A token is sampled from one model's distribution (`Sampling`), or from those of student and teacher (`PairSampling`).
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import RolloutConfig, Sampling

_BLOCK = 256  # tokens


# Folded into the keys of further answers, with the answer's number; tokens and token weights fold in smaller numbers
ANSWER_KEYS = 2**31


def row_keys(seed: int, step: jax.Array, index_B: jax.Array, answers: int = 1) -> jax.Array:
    """A key for each row from (seed, step, the prompt's index, the answer's number).

    It does not depend on the position of the prompt in the batch, and that of answer 0 not on `answers` either.

    Args:
      answers: consecutive rows that answer one prompt.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    first_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
    if answers == 1:
        return first_B
    number_B = jnp.arange(len(index_B)) % answers
    further_B = jax.vmap(jax.random.fold_in)(first_B, jnp.uint32(ANSWER_KEYS) + number_B.astype(jnp.uint32))
    return jnp.where(number_B > 0, further_B, first_B)


@dataclass(frozen=True, kw_only=True)
class Exploration(Sampling):
    """The sampling of the first answer to each prompt, and that of the others."""

    others: Sampling
    answers: int  # consecutive rows that answer one prompt


class PairSampling(Protocol):
    """How a token is sampled from the distributions S of the student and T of the teacher. Hashable."""

    def __call__(self, student_NV: jax.Array, teacher_NV: jax.Array, keys_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens int32[N], and the log-probabilities float32[N] that the rollout records.

        Args:
          student_NV, teacher_NV: logits.
          keys_N: random keys.
        """


@dataclass(frozen=True)
class Mixed:
    """Each token from `alpha T + (1 - alpha) S` (MiniLLM, arXiv 2306.08543). Records its log-probability there."""

    alpha: float

    def __call__(self, student_NV: jax.Array, teacher_NV: jax.Array, keys_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_teacher = jnp.log(self.alpha) + jax.nn.log_softmax(teacher_NV, axis=-1)
        of_student = jnp.log1p(-self.alpha) + jax.nn.log_softmax(student_NV, axis=-1)
        mixture_NV = jnp.logaddexp(of_teacher, of_student)
        token_N = sample(mixture_NV, keys_N, Sampling())
        return token_N, _at(mixture_NV, token_N)


@dataclass(frozen=True)
class Speculative:
    """The student's token if it is among the teacher's `top_k` most likely ones, else another one from the teacher.

    It is the distribution of Speculative KD (arXiv 2410.11325), whose teacher checks blocks of the student's tokens.
    Records the student's log-probability at temperature 1, unfiltered.
    """

    student: Sampling
    teacher: Sampling
    top_k: int

    def __call__(self, student_NV: jax.Array, teacher_NV: jax.Array, keys_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        token_N = sample(student_NV, keys_N, self.student)
        least_N = jax.lax.top_k(teacher_NV, min(self.top_k, teacher_NV.shape[-1]))[0][:, -1]
        redrawn_N = sample(teacher_NV, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_N, 1), self.teacher)
        token_N = jnp.where(_at(teacher_NV, token_N) >= least_N, token_N, redrawn_N)
        return token_N, _at(jax.nn.log_softmax(student_NV, axis=-1), token_N)


def _at(array_NV: jax.Array, token_N: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array_NV, token_N[:, None], axis=1)[:, 0]


def sampling_of(settings: RolloutConfig) -> Sampling | Mixed | Speculative:
    """How the answers of a rollout are sampled."""
    first, teacher = Sampling.of(settings), settings.teacher_sampling
    if settings.sampler == "mixed":
        return Mixed(teacher.alpha)
    if settings.sampler == "speculative":
        return Speculative(first, Sampling.of(teacher), teacher.accept_top_k)
    if settings.exploration is None:
        return first
    temperature, top_p = settings.exploration
    others = Sampling(temperature=temperature, top_p=top_p)
    return Exploration(**vars(first), others=others, answers=settings.answers_per_prompt)


def sample_rows(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, row_B: jax.Array) -> jax.Array:
    """`sample`, for rows of a batch with these numbers, which may be explorations."""
    first_B = sample(logits_BV, keys_B, sampling)
    if not isinstance(sampling, Exploration):
        return first_B
    return jnp.where(row_B % sampling.answers > 0, sample(logits_BV, keys_B, sampling.others), first_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Tokens int32[B], each sampled from its row's filtered distribution with its row's key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filtered(logits_BV / sampling.temperature, sampling)
    mass_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    return _draw(mass_BV, uniform_B2)


def _draw(mass_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
    """Inverse transform sampling: first of a block of tokens, then of one token of the block.

    It needs two random numbers per row; Gumbel noise needs one per token and is thirty times slower on a CPU.
    """
    rows, vocab = mass_BV.shape
    blocks = -(-vocab // _BLOCK)
    mass_BNK = jnp.pad(mass_BV, ((0, 0), (0, blocks * _BLOCK - vocab))).reshape(rows, blocks, _BLOCK)
    block_B = _first_beyond(jnp.sum(mass_BNK, axis=-1), uniform_B2[:, 0])
    within_BK = jnp.take_along_axis(mass_BNK, block_B[:, None, None], axis=1)[:, 0]
    return block_B * _BLOCK + _first_beyond(within_BK, uniform_B2[:, 1])


def _first_beyond(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """int32[B], the first index where the cumulative sum exceeds `uniform` times the total and the mass is not 0."""
    running_BN = jnp.cumsum(mass_BN, axis=-1)
    beyond_BN = (running_BN > (uniform_B * running_BN[:, -1])[:, None]) & (mass_BN > 0)
    # Because of rounding, there may be no such index; then the index with the most mass is used.
    place_B = jnp.where(jnp.any(beyond_BN, axis=-1), jnp.argmax(beyond_BN, axis=-1), jnp.argmax(mass_BN, axis=-1))
    return place_B.astype(jnp.int32)


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of tokens that top-k, top-p and min-p exclude to -inf. The most likely token always stays.

    All tokens whose logit is equal to the smallest one that stays are kept.
    """
    if sampling.top_k > 0:
        kth_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)
        mass_before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_B1 = jnp.maximum(jnp.sum(mass_before_BV < sampling.top_p, axis=-1, keepdims=True), 1)
        least_B1 = jnp.take_along_axis(descending_BV, kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= best_B1 + jnp.log(sampling.min_p), logits_BV, -jnp.inf)
    return logits_BV


def entropy(log_probs: jax.Array) -> jax.Array:
    """The entropy in nats over the last axis, float32[...]; tokens with probability 0 add 0."""
    probability = jnp.exp(log_probs)
    return -jnp.sum(jnp.where(probability > 0, probability * log_probs, 0), axis=-1)
