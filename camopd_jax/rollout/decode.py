"""The student answers: the compiled parts of a rollout. `camopd_jax.rollout.generate` puts them together.

    begin       prefill, and the first token of each answer
    advance     one token a turn, for as long as the cache and enough unfinished answers last
    grow, keep  an array of the state with more slots; with fewer places
    join        new prompts take the places of finished answers
    collect     answers out of their places, back in the order of the batch; put_rows the residual stream

Token t of a row is drawn with `fold_in(key, t)`, the key being the row's own: an answer depends on its own prompt and
key, and neither on its place nor on what else is being answered.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from camopd_jax.rollout.sampling import Sampling, sample
from camopd_jax.runtime.mesh import sharding, take_rows
from camopd_jax.types import EMPTY, KVCache, LanguageModel, Params, Prompts, Rollout


@struct.dataclass
class Decoding:
    """Answers in the making, in N places. A place holds one row of the batch at a time.

    The cache's slots behind the prompts are a ring: all places write the same slot in a turn, and none is written
    again while an answer that needs it goes on.
    """

    row: jax.Array  # int32[N], of the batch; its number of rows stands for nobody
    prompt_lengths: jax.Array  # int32[N]
    keys: jax.Array  # random key [N]
    tokens: jax.Array  # int32[N, T]; the last drawn is not in the cache yet
    log_probs: jax.Array  # float32[N, T]
    entropy: jax.Array  # float32[N], sum over the answer so far
    lengths: jax.Array  # int32[N]
    stopped: jax.Array  # bool[N]
    cache: KVCache  # P slots of prompts, then the ring
    slot: jax.Array  # int32[], of the ring, that is written next

    @property
    def running(self) -> jax.Array:
        """bool[N], the answers that go on."""
        return ~self.stopped & (self.lengths < self.tokens.shape[1])


def shardings(mesh: Mesh | None) -> Decoding | None:
    """Where a state's arrays lie."""
    if mesh is None:
        return None
    rows, cache = sharding(mesh, "batch"), sharding(mesh, "batch", "kv_heads", "sequence", "head_dim")
    alike = dict.fromkeys(_OF_PLACES, rows)
    return Decoding(**alike, cache=KVCache(cache, cache, rows, rows), slot=sharding(mesh))


_OF_PLACES = ("row", "prompt_lengths", "keys", "tokens", "log_probs", "entropy", "lengths", "stopped")


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
) -> Decoding:
    """Reads the prompts of these rows and draws the first token of each answer. The ring has no slots yet.

    Args:
      params: as `model.for_decoding` makes them.
      keys_B: a random key for each row of the batch (`sampling.row_keys`).
      rows_N: which rows; beyond the last: nobody.
      eos_ids: tokens that end an answer; without any, every answer has `max_new` tokens.
      keep_residuals: whether the cache keeps the residual stream of all its tokens.
    """
    asked, keys = take_rows((prompts, keys_B), rows_N, model.mesh)
    places = len(rows_N)
    hidden_NPD, cache = model.prefill(params, asked.tokens, asked.lengths, keep_residuals)
    last_N11 = (asked.lengths - 1)[:, None, None]
    state = Decoding(
        row=rows_N,
        prompt_lengths=asked.lengths,
        keys=keys,
        tokens=jnp.zeros((places, max_new), jnp.int32),
        log_probs=jnp.zeros((places, max_new), jnp.float32),
        entropy=jnp.zeros((places,), jnp.float32),
        lengths=jnp.zeros((places,), jnp.int32),
        stopped=rows_N >= len(prompts.lengths),
        cache=cache,
        slot=jnp.int32(0),
    )
    hidden_ND = jnp.take_along_axis(hidden_NPD, last_N11, axis=1)[:, 0]
    return _draw(model, params, state, hidden_ND, sampling, eos_ids)


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
    """One token a turn, while more than `enough` answers go on and the longest of them fits the ring.

    Returns:
      The state, and what the host decides by: {"running": bool[N], "longest": int32[], of those that go on}.
    """

    ring = state.cache.positions.shape[1] - prompt_slots

    def longest(state: Decoding) -> jax.Array:
        return jnp.max(jnp.where(state.running, state.lengths, 0))

    def goes_on(state: Decoding) -> jax.Array:
        return (jnp.sum(state.running) > enough) & (longest(state) <= ring)

    def turn(state: Decoding) -> Decoding:
        said_N = state.lengths - 1
        token_N = jnp.take_along_axis(state.tokens, jnp.maximum(said_N, 0)[:, None], axis=1)[:, 0]
        position_N, slot = state.prompt_lengths + said_N, prompt_slots + state.slot
        hidden_ND, cache = model.decode(params, token_N, position_N, state.cache, slot)
        state = state.replace(cache=cache, slot=(state.slot + 1) % ring)
        return _draw(model, params, state, hidden_ND, sampling, eos_ids)

    state = jax.lax.while_loop(goes_on, turn, state)
    return state, {"running": state.running, "longest": longest(state)}


def _draw(
    model: LanguageModel,
    params: Params,
    state: Decoding,
    hidden_ND: jax.Array,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> Decoding:
    """Draws the next token of every answer that goes on."""
    running_N, t_N = state.running, state.lengths
    logits_NV = model.logits(params, hidden_ND)
    token_N = sample(logits_NV, jax.vmap(jax.random.fold_in)(state.keys, t_N), sampling)
    logp_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    logp_N = jnp.take_along_axis(logp_NV, token_N[:, None], axis=1)[:, 0]
    entropy_N = -jnp.sum(jnp.where(logp_NV > -jnp.inf, jnp.exp(logp_NV) * logp_NV, 0), axis=-1)
    ended_N = jnp.isin(token_N, jnp.asarray(eos_ids, jnp.int32))
    place_N = jnp.arange(len(t_N)), jnp.where(running_N, t_N, state.tokens.shape[1])  # beyond the last: not written
    return state.replace(
        tokens=state.tokens.at[place_N].set(token_N, mode="drop"),
        log_probs=state.log_probs.at[place_N].set(logp_N, mode="drop"),
        entropy=state.entropy + jnp.where(running_N, entropy_N, 0),
        lengths=state.lengths + running_N,
        stopped=state.stopped | (running_N & ended_N),
    )


# ------------------------------------------------------------------- the cache, an array at a time


def grow(array: jax.Array, slot: jax.Array, *, prompt_slots: int, slots: int) -> jax.Array:
    """A cache's array with its ring unrolled, oldest slot first, and empty slots behind it: `slots` in all.

    Args:
      array: [N, G, S, K] of keys or values, [N, S, D] of the residual stream, or int32[N, S] of positions.
      slot: of the ring, that would be written next: the oldest.
    """
    axis = 2 if array.ndim == 4 else 1
    prompt, ring = jnp.split(array, [prompt_slots], axis=axis)
    if ring.shape[axis]:
        ring = jnp.roll(ring, -slot, axis=axis)
    more = [(0, 0)] * array.ndim
    more[axis] = (0, slots - array.shape[axis])
    empty = EMPTY if array.ndim == 2 else 0
    return jnp.pad(jnp.concatenate([prompt, ring], axis=axis), more, constant_values=empty)


def keep(array: jax.Array, places_M: jax.Array) -> jax.Array:
    """An array `[N, ...]` of a state, with these places only."""
    return array[places_M]


# --------------------------------------------------------------------------------- into places and out


def join(state: Decoding, fresh: Decoding, places_M: jax.Array) -> Decoding:
    """The state with answers that have just begun, in these places; one beyond the last: nowhere."""
    slots, prompt_slots = state.cache.positions.shape[1], fresh.cache.positions.shape[1]

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[places_M].set(new, mode="drop")

    def put_prompt(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[places_M, :, :prompt_slots].set(new, mode="drop")

    seen = jnp.pad(fresh.cache.positions, ((0, 0), (0, slots - prompt_slots)), constant_values=EMPTY)
    cache = KVCache(
        tuple(map(put_prompt, state.cache.keys, fresh.cache.keys)),
        tuple(map(put_prompt, state.cache.values, fresh.cache.values)),
        put(state.cache.positions, seen),
    )
    return state.replace(cache=cache, **{name: put(getattr(state, name), getattr(fresh, name)) for name in _OF_PLACES})


def collect(said: Rollout | None, state: Decoding, *, rows: int) -> Rollout:
    """The answers of all places, finished or not, in their rows of the batch. None: nothing is said yet."""
    found = Rollout(
        state.tokens, state.lengths, state.log_probs, state.entropy / jnp.maximum(state.lengths, 1), state.stopped
    )
    if said is None:
        said = jax.tree.map(lambda new: _nothing_yet(new, rows), found)
    return jax.tree.map(lambda array, new: array.at[state.row].set(new, mode="drop"), said, found)


def put_rows(whole: jax.Array | None, array: jax.Array, row_N: jax.Array, *, rows: int) -> jax.Array:
    """`[N, S, D]` of a cache's residual stream in its rows of the batch, `[rows, S, D]`.

    Args:
      whole: the same of places that are no more, whose cache had at most as many slots; None: there were none.
    """
    if whole is None:
        whole = _nothing_yet(array, rows)
    whole = jnp.pad(whole, ((0, 0), (0, array.shape[1] - whole.shape[1]), (0, 0)))
    return whole.at[row_N].set(array, mode="drop")


def _nothing_yet(of_places: jax.Array, rows: int) -> jax.Array:
    return jnp.zeros((rows, *of_places.shape[1:]), of_places.dtype)
