"""The compiled functions of a rollout whose tokens student and teacher sample together: `begin` and `advance`.

They take the place of those of `rollout.decode`. Both models read every token: each has its own prompts, parameters and
cache, and both are computed in one program. The slot of a token is the same in both caches.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from camopd_jax.rollout import decode
from camopd_jax.rollout.decode import Decoding
from camopd_jax.rollout.sampling import PairSampling
from camopd_jax.types import KVCache, LanguageModel, Params, PromptBatch, Prompts, Residuals


@dataclass(frozen=True)
class Pair:
    """Student and teacher on one mesh. Hashable: a static argument of compiled functions."""

    student: LanguageModel
    teacher: LanguageModel

    @property
    def both(self) -> tuple[LanguageModel, LanguageModel]:
        return self.student, self.teacher

    @property
    def mesh(self) -> Mesh | None:
        return self.student.mesh

    def on(self, mesh: Mesh | None) -> "Pair":
        """The same models on another mesh of the same devices."""
        return Pair(self.student.on(mesh), self.teacher.on(mesh))


class PairedPrompts(struct.PyTreeNode):
    """The same requests as student and teacher read them."""

    student: Prompts
    teacher: Prompts

    @property
    def tokens(self) -> jax.Array:
        """int32[B, P], the wider ones; both are padded to this width."""
        return max(self.student.tokens, self.teacher.tokens, key=lambda tokens: tokens.shape[1])

    @property
    def lengths(self) -> jax.Array:
        """int32[B], the student's."""
        return self.student.lengths

    @staticmethod
    def of(prompts: PromptBatch) -> "PairedPrompts":
        return PairedPrompts(prompts.student, prompts.teacher)


class PairedCache(struct.PyTreeNode):
    """The caches of both models."""

    student: KVCache
    teacher: KVCache

    @property
    def positions(self) -> jax.Array:
        """int32[N, S], the student's."""
        return self.student.positions

    @property
    def residuals(self) -> Residuals:
        return ()


class PairedDecoding(Decoding):
    """Answers in progress. Log-probabilities are those of the sampler, the entropy is the student's."""

    cache: PairedCache  # type: ignore[assignment]  # in place of one cache
    teacher_prompt_lengths: jax.Array  # int32[N]

    @property
    def lanes(self) -> tuple[str, ...]:
        return *super().lanes, "teacher_prompt_lengths"


def shardings(mesh: Mesh | None) -> PairedDecoding | None:
    """The shardings of a state's arrays."""
    of_one = decode.shardings(mesh)
    if mesh is None or of_one is None:
        return None
    cache, rows = PairedCache(of_one.cache, of_one.cache), of_one.prompt_lengths
    return PairedDecoding(**vars(of_one) | {"cache": cache}, teacher_prompt_lengths=rows)


def begin(
    models: Pair,
    params: tuple[Params, Params],
    prompts: PairedPrompts,
    keys_B: jax.Array,
    rows_N: jax.Array,
    *,
    sampling: PairSampling,
    eos_ids: tuple[int, ...],
    max_new: int,
    keep_residuals: bool = False,
    answers_per_prompt: int = 1,
) -> PairedDecoding:
    """As `decode.begin`. `params`: of student and teacher, the results of `for_decoding`."""
    assert not keep_residuals, "residual streams are only kept of answers that the student samples alone"
    slots = prompts.tokens.shape[1]
    states, hidden = [], []
    for model, of_model, own in zip(models.both, params, (prompts.student, prompts.teacher), strict=True):
        padded = own.replace(tokens=jnp.pad(own.tokens, ((0, 0), (0, slots - own.tokens.shape[1]))))
        state, hidden_ND = decode.prefill(
            model, of_model, padded, keys_B, rows_N, max_new=max_new, answers_per_prompt=answers_per_prompt
        )
        states.append(state)
        hidden.append(hidden_ND)
    student, teacher = states
    cache = PairedCache(student.cache, teacher.cache)
    both = PairedDecoding(**vars(student) | {"cache": cache}, teacher_prompt_lengths=teacher.prompt_lengths)
    return _draw(models, params, both, hidden, sampling, eos_ids)


def advance(
    models: Pair,
    params: tuple[Params, Params],
    state: PairedDecoding,
    enough: jax.Array,
    *,
    prompt_slots: int,
    sampling: PairSampling,
    eos_ids: tuple[int, ...],
) -> tuple[PairedDecoding, dict[str, jax.Array]]:
    """As `decode.advance`."""
    ring = state.cache.positions.shape[1] - prompt_slots

    def turn(state: PairedDecoding) -> PairedDecoding:
        last_N, token_N = decode.last_tokens(state)
        slot = prompt_slots + state.slot
        caches, hidden = [], []
        for model, of_model, prompt_lengths, cache in zip(
            models.both,
            params,
            (state.prompt_lengths, state.teacher_prompt_lengths),
            (state.cache.student, state.cache.teacher),
            strict=True,
        ):
            hidden_ND, cache = model.decode(of_model, token_N, prompt_lengths + last_N, cache, slot)
            caches.append(cache)
            hidden.append(hidden_ND)
        state = state.replace(cache=PairedCache(*caches), slot=(state.slot + 1) % ring)
        return _draw(models, params, state, hidden, sampling, eos_ids)

    return decode.take_turns(turn, state, enough, ring)


def _draw(
    models: Pair,
    params: tuple[Params, Params],
    state: PairedDecoding,
    hidden: list[jax.Array],
    sampling: PairSampling,
    eos_ids: tuple[int, ...],
) -> PairedDecoding:
    """Samples the next token of every unfinished answer. `hidden`: [N, D] of student and teacher."""
    student_NV, teacher_NV = (
        model.logits(of_model, hidden_ND)
        for model, of_model, hidden_ND in zip(models.both, params, hidden, strict=True)
    )
    token_N, logp_N = sampling(student_NV, teacher_NV, decode.token_keys(state))
    return decode.append(state, token_N, logp_N, jax.nn.log_softmax(student_NV, axis=-1), eos_ids)
