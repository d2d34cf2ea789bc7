"""Samples answers to a batch of prompts: the host's loop over the compiled functions of `rollout.decode`.

The devices sample without the host until the cache is full or enough answers are finished. Then the host enlarges the
cache; or puts waiting prompts into the lanes of finished answers (continuous refill); or, if no prompts wait, reduces
the batch to the unfinished answers. None of this changes an answer.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camopd_jax.config.schema import Sampling
from camopd_jax.rollout import decode, paired
from camopd_jax.rollout.decode import Decoding
from camopd_jax.rollout.paired import Pair, PairedPrompts
from camopd_jax.rollout.sampling import Mixed, Speculative
from camopd_jax.runtime.mesh import batch_shards, gather, sharding
from camopd_jax.runtime.tuning import compiler_options
from camopd_jax.types import ATTENTION, LanguageModel, Params, Prompts, Residuals, Rollout

FIRST_RING = 256  # first number of cache slots after the prompts; it doubles each time the cache is full
REFILL = 8  # waiting prompts start when 1/8 of the lanes is free


_OF_BEGIN = ("keep_residuals", "answers_per_prompt")  # fields of `Decode`


@dataclass(frozen=True)
class RolloutPrograms:
    """The compiled functions of a rollout."""

    begin: Any
    advance: Any
    grow: dict[bool, Any]  # True: for keys and values; False: for arrays without a head axis
    keep: dict[bool, Any]
    join: Any
    collect: Any
    put_rows: Any


def programs(mesh: Mesh | None, tuned: bool = True) -> RolloutPrograms:
    """The functions of `rollout.decode`, for answers of one model; `tuned` as in `Decode`."""
    return _jit(mesh, decode, tuned)


def programs_of(model: LanguageModel | Pair, tuned: bool = True) -> RolloutPrograms:
    """The functions of `rollout.decode`, or of `rollout.paired` for answers of student and teacher together."""
    return _jit(model.mesh, paired if isinstance(model, Pair) else decode, tuned)


@functools.cache
def _jit(mesh: Mesh | None, module: Any, tuned: bool) -> RolloutPrograms:
    """Jits the functions of a module. Results have fixed shardings, so that nothing compiles twice."""
    options = compiler_options(mesh, tuned)
    state, of_one = module.shardings(mesh), decode.shardings(mesh)
    rows, everywhere = (None, None) if mesh is None else (sharding(mesh, "batch"), sharding(mesh))
    of_cache = {True: of_one and of_one.cache.keys, False: rows}
    drawn = ("sampling", "eos_ids")
    return RolloutPrograms(
        begin=jax.jit(
            module.begin,
            static_argnums=0,
            static_argnames=(*drawn, "max_new", *_OF_BEGIN),
            out_shardings=state,
            compiler_options=options,
        ),
        advance=jax.jit(
            module.advance,
            static_argnums=0,
            static_argnames=(*drawn, "prompt_slots"),
            donate_argnums=2,
            out_shardings=(state, everywhere),
            compiler_options=options,
        ),
        grow={
            heads: jax.jit(decode.grow, static_argnames=("prompt_slots", "slots"), out_shardings=sharded)
            for heads, sharded in of_cache.items()
        },
        keep={heads: jax.jit(decode.keep, out_shardings=sharded) for heads, sharded in of_cache.items()},
        join=jax.jit(decode.join, donate_argnums=0, out_shardings=state),
        collect=jax.jit(decode.collect, static_argnames="rows", donate_argnums=0, out_shardings=rows),
        put_rows=jax.jit(decode.put_rows, static_argnames="rows", donate_argnums=0, out_shardings=rows),
    )


def for_decoding(model: LanguageModel | Pair, params: Params) -> Params:
    """Compiled `model.for_decoding`: casts the parameters and moves them to the model's mesh.

    The layers are moved one at a time, because a move between different meshes needs memory for more than a chip's
    shard of an array. On one CPU device, layers that need neither move nor cast are views of the stacked arrays. The
    parameters of a pair are those of student and teacher.
    """
    if isinstance(model, Pair):
        return tuple(for_decoding(one, of_one) for one, of_one in zip(model.both, params, strict=True))
    move = moves(model, tuple(params))
    stacks = params["layers"]
    if _readable_in_place(model, stacks):
        layers = _views(model, stacks, len(model.layer_attention))
    else:
        layers = tuple(move[layer_move(name)](stacks, np.int32(i)) for i, name in enumerate(model.layer_attention))
    return {name: layers if name == "layers" else move[name](array) for name, array in params.items()}


def layer_move(attention: str) -> str:
    """The name among `moves` of the function for layers with this attention."""
    return "layers" if attention == ATTENTION else f"layers ({attention})"


def _readable_in_place(model: LanguageModel, stacks: Params) -> bool:
    """Whether the parameters are on the CPU device that samples, in its dtype, without an adapter to merge."""
    arrays, dtype = jax.tree.leaves(stacks), np.dtype(model.dtype)
    devices = arrays[0].devices()
    answering = devices if model.mesh is None else set(model.mesh.devices.flat)
    one_cpu = [device.platform for device in devices] == ["cpu"]
    alike = all(array.devices() == answering and array.dtype == dtype for array in arrays)
    return one_cpu and alike and _keeps_leaves(model, stacks)


def _keeps_leaves(model: LanguageModel, stacks: Params) -> bool:
    """Whether a layer for decoding has the stacked leaves, none of them merged into another."""
    layer: Any = jax.tree.structure(jax.eval_shape(model.layer_for_decoding, stacks, 0))
    return bool(layer == jax.tree.structure(stacks))


def _views(model: LanguageModel, stacks: Params, count: int) -> tuple[Params, ...]:
    """Views of each layer of stacked arrays. If a stacked array is donated while views of it exist, JAX copies it."""
    shardings = model.decoding_shardings
    targets = jax.tree.leaves(stacks)[0].device if shardings is None else shardings["layers"]
    arrays = jax.tree.map(np.asarray, stacks)
    layers = tuple(jax.tree.map(lambda array, i=i: array[i], arrays) for i in range(count))
    return jax.device_put(layers, targets, may_alias=True)


@functools.cache
def moves(model: LanguageModel, names: tuple[str, ...]) -> dict[str, Any]:
    """The compiled functions of `for_decoding` by name: `layer_move` for one layer, and one for each other parameter.

    They use `out_shardings`, because JAX ignores a sharding constraint inside a function on a mesh other than the
    arguments'.
    """
    targets = model.decoding_shardings or dict.fromkeys(names)

    def alone(name: str) -> Any:
        return jax.jit(lambda array: model.others_for_decoding({name: array})[name], out_shardings=targets[name])

    others = {name: alone(name) for name in names if name != "layers"}
    for attention in dict.fromkeys(model.layer_attention):
        layer = targets["layers"] and targets["layers"][model.layer_attention.index(attention)]
        one_layer = functools.partial(model.layer_for_decoding, attention=attention)
        others[layer_move(attention)] = jax.jit(one_layer, out_shardings=layer)
    return others


@dataclass(frozen=True)
class Decode:
    """Settings of a rollout."""

    sampling: Sampling | Mixed | Speculative  # the last two for a `Pair`
    eos_ids: tuple[int, ...]
    max_new: int
    concurrency: int = 0  # answers in progress at a time; 0: the whole batch
    shrinks: bool = False  # whether the batch is halved when half of its answers are finished
    keep_residuals: bool = False  # whether to return the residual stream; only without `concurrency`
    answers_per_prompt: int = 1  # as many consecutive rows have the same prompt, which is computed once
    tuned: bool = True  # whether a GPU's compiler tunes the products (`runtime.tuning`)

    @property
    def of_begin(self) -> dict[str, Any]:
        """The arguments of `decode.begin`."""
        return {"max_new": self.max_new} | {name: getattr(self, name) for name in _OF_BEGIN}


def refill_size(lanes: int, shards: int) -> int:
    """Number of waiting rows that start at a time: about 1/8 of the lanes, a multiple of `shards`.

    Args:
      shards: of a batch; with several answers per prompt, times their number.
    """
    return -(-lanes // (REFILL * shards)) * shards


def rings(max_new: int) -> Iterator[int]:
    """The numbers of cache slots after the prompts, in ascending order; the last one is `max_new`.

    >>> list(rings(1000))
    [256, 512, 1000]
    """
    ring = FIRST_RING
    while ring < max_new:
        yield ring
        ring *= 2
    yield max_new


def answers(
    model: LanguageModel | Pair,
    params: Params,
    prompts: Prompts | PairedPrompts,
    keys_B: jax.Array,
    how: Decode,
    meanwhile: Callable[[], None] | None = None,
) -> Rollout:
    """Samples an answer of at most `how.max_new` tokens to each prompt.

    Args:
      params: the result of `for_decoding`.
      keys_B: a random key for each row of the batch (`sampling.row_keys`).
      meanwhile: called once, while the devices sample.
    """
    rows, prompt_slots = prompts.tokens.shape
    p, shards = programs_of(model, how.tuned), batch_shards(model.mesh)
    lanes = min(how.concurrency or rows, rows)
    refill = refill_size(lanes, shards * how.answers_per_prompt)
    drawing = {"sampling": how.sampling, "eos_ids": how.eos_ids}

    def begin(rows_N: np.ndarray) -> Decoding:
        return p.begin(model, params, prompts, keys_B, rows_N, **how.of_begin, **drawing)

    done: Rollout | None = None
    residuals: Residuals = ()
    waiting = np.arange(lanes, rows, dtype=np.int32)
    wider = rings(how.max_new)
    ring = next(wider)
    state = _grow(p, begin(np.arange(lanes, dtype=np.int32)), prompt_slots, 0, ring)
    while True:
        half = len(state.row) // 2
        shrinks = how.shrinks and half >= shards and half % shards == 0
        enough = len(state.row) - refill if len(waiting) else half if shrinks else 0
        state, progress = p.advance(model, params, state, np.int32(enough), prompt_slots=prompt_slots, **drawing)
        if meanwhile is not None:
            meanwhile()
            meanwhile = None
        progress = gather(progress)
        running, longest = progress["running"], int(progress["longest"])
        if longest > ring:
            filled, ring = ring, next(wider)
            state = _grow(p, state, prompt_slots, filled, ring)
            continue
        done = p.collect(done, state, rows=rows)
        if len(waiting):
            entering, waiting = waiting[:refill], waiting[refill:]
            free = np.flatnonzero(~running)[: len(entering)]
            state = p.join(state, begin(_fill(entering, refill, rows)), _fill(free, refill, len(running)))
        elif running.any():
            residuals = _put_rows(p, residuals, state, rows)
            state = _keep(p, state, np.argsort(~running, kind="stable")[:half].astype(np.int32))
        elif residuals:
            return done.replace(residuals=_put_rows(p, residuals, state, rows))
        else:  # no lane was removed: row i is in lane i
            return done.replace(residuals=state.cache.residuals)


def _fill(numbers: np.ndarray, size: int, none: int) -> np.ndarray:
    """The numbers, padded to this size with `none`."""
    return np.pad(numbers, (0, size - len(numbers)), constant_values=none).astype(np.int32)


def _grow(p: RolloutPrograms, state: Decoding, prompt_slots: int, filled: int, ring: int) -> Decoding:
    """Enlarges the ring to `ring` slots, of which the first `filled` are in use."""
    sizes = {"prompt_slots": prompt_slots, "slots": prompt_slots + ring}
    cache = _one_by_one(lambda array: p.grow[array.ndim == 4](array, state.slot, **sizes), state.cache)
    return state.replace(cache=cache, slot=jax.device_put(np.int32(filled), state.slot.sharding))


def _put_rows(p: RolloutPrograms, residuals: Residuals, state: Decoding, rows: int) -> Residuals:
    """The residual stream in the rows of the batch: of lanes removed earlier, and of all present lanes."""
    before = residuals or (None,) * len(state.cache.residuals)
    return tuple(
        p.put_rows(stream, array, state.row, rows=rows)
        for stream, array in zip(before, state.cache.residuals, strict=True)
    )


def _keep(p: RolloutPrograms, state: Decoding, lanes_M: np.ndarray) -> Decoding:
    """The state reduced to these lanes."""
    lanes = _one_by_one(lambda array: p.keep[array.ndim == 4](array, lanes_M), state.replace(slot=None))
    return lanes.replace(slot=state.slot)


def _one_by_one(change: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Applies `change` to each array and deletes the old one, so that only one array is in memory twice at a time."""

    def replace(array: jax.Array) -> jax.Array:
        new = change(array)
        array.delete()
        return new

    return jax.tree.map(replace, tree)
