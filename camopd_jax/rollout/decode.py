"""The compiled functions of a rollout, which `rollout.generate` calls. N lanes answer the rows of a batch.

    begin       prefill, and sample the first token of each answer
    advance     sample further tokens until the cache is full or enough answers are finished
    grow, keep  enlarge an array of the state to more slots; reduce it to some of the lanes
    join        put new prompts into the lanes of finished answers
    collect     copy the answers from the lanes to the rows of the batch; put_rows: the same for the residual stream

Token t of a row is sampled with `fold_in(key, t)` from the row's own key. So an answer depends only on its prompt and
key, not on its lane or on the other answers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from camopd_jax.config.schema import Sampling
from camopd_jax.rollout.sampling import entropy, sample_rows
from camopd_jax.runtime.mesh import sharding, take_rows
from camopd_jax.types import EMPTY, KVCache, LanguageModel, Params, Prompts, Rollout


class Decoding(struct.PyTreeNode):
    """Answers in progress, in N lanes. A lane holds one row of the batch at a time.

    The cache's slots after the prompts are a ring buffer. In each turn, all lanes write the same slot. A slot is not
    written again while an unfinished answer needs it.
    """

    row: jax.Array  # int32[N], row number in the batch; the number of rows means: no row
    prompt_lengths: jax.Array  # int32[N]
    keys: jax.Array  # random key [N]
    tokens: jax.Array  # int32[N, T]; the last sampled token is not in the cache yet
    log_probs: jax.Array  # float32[N, T]
    entropy: jax.Array  # float32[N], sum over the tokens so far
    lengths: jax.Array  # int32[N]
    stopped: jax.Array  # bool[N]
    cache: KVCache  # P slots for prompts, then the ring
    slot: jax.Array  # int32[], the slot of the ring that is written next

    @property
    def lanes(self) -> tuple[str, ...]:
        """The names of the arrays with one entry per lane, other than the cache."""
        return _OF_LANES

    @property
    def running(self) -> jax.Array:
        """bool[N], True for unfinished answers."""
        return ~self.stopped & (self.lengths < self.tokens.shape[1])


def shardings(mesh: Mesh | None) -> Decoding | None:
    """The shardings of a state's arrays."""
    if mesh is None:
        return None
    rows: Any = sharding(mesh, "batch")  # Any: the dataclass has arrays here
    cache: Any = sharding(mesh, "batch", "kv_heads", "sequence", "head_dim")
    slot: Any = sharding(mesh)
    return Decoding(**dict.fromkeys(_OF_LANES, rows), cache=KVCache(cache, cache, rows, rows), slot=slot)


_OF_LANES = ("row", "prompt_lengths", "keys", "tokens", "log_probs", "entropy", "lengths", "stopped")
State = TypeVar("State", bound=Decoding)


def begin(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    keys_B: jax.Array,
    rows_N: jax.Array,
    *,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    max_new: int,
    keep_residuals: bool = False,
    answers_per_prompt: int = 1,
) -> Decoding:
    """Prefills the prompts of these rows and samples the first token of each answer. The ring has no slots yet.

    Args:
      params: the result of `model.for_decoding`.
      keys_B: a random key for each row of the batch (`sampling.row_keys`).
      rows_N: row numbers; B means no row.
      eos_ids: tokens that end an answer; if there are none, every answer has `max_new` tokens.
      keep_residuals: whether the cache stores the residual stream of all its tokens.
      answers_per_prompt: as many consecutive rows have the same prompt, which is computed once.
    """
    state, hidden_ND = prefill(
        model,
        params,
        prompts,
        keys_B,
        rows_N,
        max_new=max_new,
        keep_residuals=keep_residuals,
        answers_per_prompt=answers_per_prompt,
    )
    return _draw(model, params, state, hidden_ND, sampling, eos_ids)


def prefill(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    keys_B: jax.Array,
    rows_N: jax.Array,
    *,
    max_new: int,
    keep_residuals: bool = False,
    answers_per_prompt: int = 1,
) -> tuple[Decoding, jax.Array]:
    """Answers without tokens, and the hidden states `[N, D]` that predict the first ones; arguments as for `begin`."""
    own, keys = take_rows((prompts, keys_B), rows_N, model.mesh)
    lanes = len(rows_N)
    distinct = own
    if answers_per_prompt > 1:
        distinct = take_rows(prompts, rows_N[::answers_per_prompt], model.mesh)
    hidden_QPD, cache = model.prefill(params, distinct.tokens, distinct.lengths, keep_residuals)
    last_Q11 = (distinct.lengths - 1)[:, None, None]
    hidden_ND = jnp.take_along_axis(hidden_QPD, last_Q11, axis=1)[:, 0]
    if answers_per_prompt > 1:
        repeat = partial(repeat_rows, times=answers_per_prompt)
        hidden_ND, cache = jax.tree.map(repeat, (hidden_ND, cache))
    state = Decoding(
        row=rows_N,
        prompt_lengths=own.lengths,
        keys=keys,
        tokens=jnp.zeros((lanes, max_new), jnp.int32),
        log_probs=jnp.zeros((lanes, max_new), jnp.float32),
        entropy=jnp.zeros((lanes,), jnp.float32),
        lengths=jnp.zeros((lanes,), jnp.int32),
        stopped=rows_N >= len(prompts.lengths),
        cache=cache,
        slot=jnp.int32(0),
    )
    return state, hidden_ND


def repeat_rows(array: jax.Array, times: int) -> jax.Array:
    """Repeats each row of `[N, ...]` in place, `[times N, ...]`; a reshape of rows split over devices stays split."""
    rows, *others = array.shape
    return jnp.broadcast_to(array[:, None], (rows, times, *others)).reshape(rows * times, *others)


def advance(
    model: LanguageModel,
    params: Params,
    state: Decoding,
    enough: jax.Array,
    *,
    prompt_slots: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> tuple[Decoding, dict[str, jax.Array]]:
    """Samples one token per turn while more than `enough` answers are unfinished and the longest of them fits the ring.

    Returns:
      The state, and the values that the host needs: {"running": bool[N], "longest": int32[], of unfinished answers}.
    """
    ring = state.cache.positions.shape[1] - prompt_slots

    def turn(state: Decoding) -> Decoding:
        last_N, token_N = last_tokens(state)
        position_N, slot = state.prompt_lengths + last_N, prompt_slots + state.slot
        hidden_ND, cache = model.decode(params, token_N, position_N, state.cache, slot)
        state = state.replace(cache=cache, slot=(state.slot + 1) % ring)
        return _draw(model, params, state, hidden_ND, sampling, eos_ids)

    return take_turns(turn, state, enough, ring)


def take_turns(
    turn: Callable[[State], State], state: State, enough: jax.Array, ring: int
) -> tuple[State, dict[str, jax.Array]]:
    """The loop of `advance`. `ring`: slots of the cache after the prompts."""

    def longest(state: State) -> jax.Array:
        return jnp.max(jnp.where(state.running, state.lengths, 0))

    def goes_on(state: State) -> jax.Array:
        return (jnp.sum(state.running) > enough) & (longest(state) <= ring)

    state = jax.lax.while_loop(goes_on, turn, state)
    return state, {"running": state.running, "longest": longest(state)}


def last_tokens(state: Decoding) -> tuple[jax.Array, jax.Array]:
    """The index of each answer's last token, and the token: int32[N] both."""
    last_N = state.lengths - 1
    return last_N, jnp.take_along_axis(state.tokens, jnp.maximum(last_N, 0)[:, None], axis=1)[:, 0]


def _draw(
    model: LanguageModel,
    params: Params,
    state: Decoding,
    hidden_ND: jax.Array,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> Decoding:
    """Samples the next token of every unfinished answer."""
    logits_NV = model.logits(params, hidden_ND)
    token_N = sample_rows(logits_NV, token_keys(state), sampling, state.row)
    logp_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    logp_N = jnp.take_along_axis(logp_NV, token_N[:, None], axis=1)[:, 0]
    return append(state, token_N, logp_N, logp_NV, eos_ids)


def token_keys(state: Decoding) -> jax.Array:
    """The random keys `[N]` of the next tokens."""
    return jax.vmap(jax.random.fold_in)(state.keys, state.lengths)


def append(state: State, token_N: jax.Array, logp_N: jax.Array, logp_NV: jax.Array, eos_ids: tuple[int, ...]) -> State:
    """Adds a token to every unfinished answer.

    Args:
      logp_N: the log-probabilities of the tokens that are recorded.
      logp_NV: the student's log-probabilities of all tokens, for the entropy.
    """
    running_N, t_N = state.running, state.lengths
    ended_N = jnp.isin(token_N, jnp.asarray(eos_ids, jnp.int32))
    slot_N = jnp.where(running_N, t_N, state.tokens.shape[1])  # T: not written
    return state.replace(
        tokens=_set_slot(state.tokens, slot_N, token_N),
        log_probs=_set_slot(state.log_probs, slot_N, logp_N),
        entropy=state.entropy + jnp.where(running_N, entropy(logp_NV), 0),
        lengths=state.lengths + running_N,
        stopped=state.stopped | (running_N & ended_N),
    )


@jax.vmap
def _set_slot(row: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """Writes a value into each row of [N, T]. Row by row, so that devices need no rows of others."""
    return row.at[slot].set(value, mode="drop")


# ------------------------------------------------------------------- the cache, one array at a time


def grow(array: jax.Array, slot: jax.Array, *, prompt_slots: int, slots: int) -> jax.Array:
    """Enlarges an array of a cache to `slots` slots: the ring starts at its oldest slot, and empty slots follow it.

    Args:
      array: keys or values [N, G, S, K], the residual stream [N, S, D], or positions int32[N, S].
      slot: the slot of the ring that would be written next, which is the oldest.
    """
    axis = 2 if array.ndim == 4 else 1
    prompt, ring = jnp.split(array, [prompt_slots], axis=axis)
    if ring.shape[axis]:
        ring = jnp.roll(ring, -slot, axis=axis)
    more = [(0, 0)] * array.ndim
    more[axis] = (0, slots - array.shape[axis])
    empty = EMPTY if array.ndim == 2 else 0
    return jnp.pad(jnp.concatenate([prompt, ring], axis=axis), more, constant_values=empty)


def keep(array: jax.Array, lanes_M: jax.Array) -> jax.Array:
    """An array `[N, ...]` of a state reduced to these lanes."""
    return array[lanes_M]


# ---------------------------------------------------------------------------------- into and out of lanes


def join(state: Decoding, fresh: Decoding, lanes_M: jax.Array) -> Decoding:
    """Puts new answers (`fresh`, from `begin`) into these lanes of the state; lane N means: nowhere."""

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[lanes_M].set(new, mode="drop")

    def put_prompts(cache: KVCache, new: KVCache) -> KVCache:
        slots, prompt_slots = cache.positions.shape[1], new.positions.shape[1]

        def put_prompt(array: jax.Array, new: jax.Array) -> jax.Array:
            return array.at[lanes_M, :, :prompt_slots].set(new, mode="drop")

        seen = jnp.pad(new.positions, ((0, 0), (0, slots - prompt_slots)), constant_values=EMPTY)
        return KVCache(
            tuple(map(put_prompt, cache.keys, new.keys)),
            tuple(map(put_prompt, cache.values, new.values)),
            put(cache.positions, seen),
        )

    # One cache, or those of two models
    cache = jax.tree.map(put_prompts, state.cache, fresh.cache, is_leaf=lambda part: isinstance(part, KVCache))
    return state.replace(cache=cache, **{name: put(getattr(state, name), getattr(fresh, name)) for name in state.lanes})


def collect(answers: Rollout | None, state: Decoding, *, rows: int) -> Rollout:
    """Copies the answers of all lanes, finished or not, to their rows of `answers`; None: a new batch."""
    of_lanes = Rollout(
        state.tokens, state.lengths, state.log_probs, state.entropy / jnp.maximum(state.lengths, 1), state.stopped
    )
    if answers is None:
        answers = jax.tree.map(lambda new: _empty_rows(new, rows), of_lanes)
    return jax.tree.map(lambda array, new: array.at[state.row].set(new, mode="drop"), answers, of_lanes)


def put_rows(stream: jax.Array | None, array: jax.Array, row_N: jax.Array, *, rows: int) -> jax.Array:
    """Copies an array `[N, S, D]` of a cache's residual stream to the rows of the batch, `[rows, S, D]`.

    Args:
      stream: the rows of lanes that were removed earlier, with at most as many slots; None: no lane was removed.
    """
    if stream is None:
        stream = _empty_rows(array, rows)
    stream = jnp.pad(stream, ((0, 0), (0, array.shape[1] - stream.shape[1]), (0, 0)))
    return stream.at[row_N].set(array, mode="drop")


def _empty_rows(of_lanes: jax.Array, rows: int) -> jax.Array:
    return jnp.zeros((rows, *of_lanes.shape[1:]), of_lanes.dtype)
