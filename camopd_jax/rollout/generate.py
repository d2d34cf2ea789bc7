"""Answers to a batch of prompts: the host's loop over the compiled parts of `steps.rollout`.

The device answers on its own until something has to be decided: the cache is too short, or enough answers have ended.
Then the cache grows; or prompts that wait take the places of finished answers (continuous refill); or, where none
waits, the answers that go on move together and the rest is computed no more. An answer is the same whatever happens
around it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camopd_jax.rollout import decode as steps
from camopd_jax.rollout.decode import Decoding
from camopd_jax.rollout.sampling import Sampling
from camopd_jax.runtime.mesh import batch_shards, gather, sharding
from camopd_jax.types import LanguageModel, Params, Prompts, Residuals, Rollout

FIRST_RING = 256  # slots of a cache beyond the prompts; then twice as many, four times ...
REFILL = 8  # prompts enter when one of so many places is free


@dataclass(frozen=True)
class Programs:
    """All that a rollout compiles."""

    begin: Any
    advance: Any
    grow: dict[bool, Any]  # True: of keys and values; False: of what has no heads
    keep: dict[bool, Any]
    join: Any
    collect: Any
    put_rows: Any


@functools.cache
def programs(mesh: Mesh | None) -> Programs:
    """Jits the parts. What each gives back has its place, so that nothing compiles twice."""
    state = steps.shardings(mesh)
    rows, everywhere = (None, None) if mesh is None else (sharding(mesh, "batch"), sharding(mesh))
    of_heads = {True: state and state.cache.keys, False: rows}
    drawn = ("sampling", "eos_ids")
    return Programs(
        begin=jax.jit(
            steps.begin, static_argnums=0, static_argnames=(*drawn, "max_new", "keep_residuals"), out_shardings=state
        ),
        advance=jax.jit(
            steps.advance,
            static_argnums=0,
            static_argnames=(*drawn, "prompt_slots"),
            donate_argnums=2,
            out_shardings=(state, everywhere),
        ),
        grow={
            heads: jax.jit(steps.grow, static_argnames=("prompt_slots", "slots"), out_shardings=place)
            for heads, place in of_heads.items()
        },
        keep={heads: jax.jit(steps.keep, out_shardings=place) for heads, place in of_heads.items()},
        join=jax.jit(steps.join, donate_argnums=0, out_shardings=state),
        collect=jax.jit(steps.collect, static_argnames="rows", donate_argnums=0, out_shardings=rows),
        put_rows=jax.jit(steps.put_rows, static_argnames="rows", donate_argnums=0, out_shardings=rows),
    )


def for_decoding(model: LanguageModel, params: Params) -> Params:
    """`model.for_decoding`, compiled: parameters go, cast, to where the model answers.

    Layer by layer: between meshes of other sizes more than its share of an array passes through every chip. On a CPU,
    layers that need neither move nor cast are read where they lie in their stacks.
    """
    move = moves(model, tuple(params))
    stacks = params["layers"]
    count = len(jax.tree.leaves(stacks)[0])
    if _lie_there(model, stacks):
        layers = _views(model, stacks, count)
    else:
        layers = tuple(move["layers"](stacks, np.int32(i)) for i in range(count))
    return {name: layers if name == "layers" else move[name](array) for name, array in params.items()}


def _lie_there(model: LanguageModel, stacks: Params) -> bool:
    """Whether parameters lie on the one CPU device that answers, in its precision."""
    arrays, dtype = jax.tree.leaves(stacks), np.dtype(model.dtype)
    here = arrays[0].devices()
    there = here if model.mesh is None else set(model.mesh.devices.flat)
    one_cpu = [device.platform for device in here] == ["cpu"]
    return one_cpu and all(array.devices() == there and array.dtype == dtype for array in arrays)


def _views(model: LanguageModel, stacks: Params, count: int) -> tuple[Params, ...]:
    """Each layer of stacks, nothing copied. A stack that is donated while its views are read is copied and not lost."""
    places = model.decoding_shardings["layers"] if model.mesh else jax.tree.leaves(stacks)[0].device
    arrays = jax.tree.map(np.asarray, stacks)
    layers = tuple(jax.tree.map(lambda array, i=i: array[i], arrays) for i in range(count))
    return jax.device_put(layers, places, may_alias=True)


@functools.cache
def moves(model: LanguageModel, names: tuple[str, ...]) -> dict[str, Any]:
    """The compiled moves of `for_decoding`: of a layer, and of what belongs to none, by name.

    Their results' places are given from outside: a constraint inside, on another mesh than the arguments', is lost.
    """
    places = model.decoding_shardings or dict.fromkeys(names)

    def alone(name: str) -> Any:
        return jax.jit(lambda array: model.others_for_decoding({name: array})[name], out_shardings=places[name])

    layer = places["layers"] and places["layers"][0]
    found = {name: alone(name) for name in names if name != "layers"}
    return found | {"layers": jax.jit(model.layer_for_decoding, out_shardings=layer)}


@dataclass(frozen=True)
class Decode:
    """How answers are drawn."""

    sampling: Sampling
    eos_ids: tuple[int, ...]
    max_new: int
    places: int = 0  # answered at one time; 0: the whole batch
    shrinks: bool = False  # whether a batch half of which is done becomes half a batch
    keep_residuals: bool = False  # whether the answers come with their residual stream; only without `places`


def entering(places: int, shards: int) -> int:
    """How many prompts that wait take free places at one time: a share of the places that the batch's pieces divide."""
    return -(-places // (REFILL * shards)) * shards


def answers(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    keys_B: jax.Array,
    decode: Decode,
    meanwhile: Callable[[], None] | None = None,
) -> Rollout:
    """An answer of at most `decode.max_new` tokens to each prompt; `steps.rollout.begin` has the arguments.

    Args:
      params: as `for_decoding` makes them.
      meanwhile: called once, while the device answers.
    """
    rows, prompt_slots = prompts.tokens.shape
    p, shards = programs(model.mesh), batch_shards(model.mesh)
    places = min(decode.places or rows, rows)
    several = entering(places, shards)
    drawn = {"sampling": decode.sampling, "eos_ids": decode.eos_ids}

    def started(rows_N: np.ndarray) -> Decoding:
        options = {"max_new": decode.max_new, "keep_residuals": decode.keep_residuals}
        return p.begin(model, params, prompts, keys_B, rows_N, **options, **drawn)

    said, residuals, waiting = None, (), np.arange(places, rows, dtype=np.int32)
    ring = min(FIRST_RING, decode.max_new)
    state = _grown(p, started(np.arange(places, dtype=np.int32)), prompt_slots, 0, ring)
    while True:
        half = len(state.row) // 2
        shrinks = decode.shrinks and half >= shards and half % shards == 0
        enough = len(state.row) - several if len(waiting) else half if shrinks else 0
        state, told = p.advance(model, params, state, np.int32(enough), prompt_slots=prompt_slots, **drawn)
        if meanwhile is not None:
            meanwhile()
            meanwhile = None
        told = gather(told)
        running, longest = told["running"], int(told["longest"])
        if longest > ring:
            filled, ring = ring, min(2 * ring, decode.max_new)
            state = _grown(p, state, prompt_slots, filled, ring)
            continue
        said = p.collect(said, state, rows=rows)
        if len(waiting):
            new, waiting = waiting[:several], waiting[several:]
            free = np.flatnonzero(~running)[: len(new)]
            state = p.join(state, started(_filled(new, several, rows)), _filled(free, several, len(running)))
        elif running.any():
            residuals = _put_rows(p, residuals, state, rows)
            state = _kept(p, state, np.argsort(~running, kind="stable")[:half].astype(np.int32))
        elif residuals:
            return said.replace(residuals=_put_rows(p, residuals, state, rows))
        else:  # nobody has left their place: row i lies in place i
            return said.replace(residuals=state.cache.residuals)


def _filled(numbers: np.ndarray, size: int, nobody: int) -> np.ndarray:
    return np.pad(numbers, (0, size - len(numbers)), constant_values=nobody).astype(np.int32)


def _grown(p: Programs, state: Decoding, prompt_slots: int, ring: int, wanted: int) -> Decoding:
    """The state with a longer ring, the first `ring` slots of it filled."""
    sizes = {"prompt_slots": prompt_slots, "slots": prompt_slots + wanted}
    cache = _one_by_one(lambda array: p.grow[array.ndim == 4](array, state.slot, **sizes), state.cache)
    return state.replace(cache=cache, slot=jax.device_put(np.int32(ring), state.slot.sharding))


def _put_rows(p: Programs, residuals: Residuals, state: Decoding, rows: int) -> Residuals:
    """The residual stream of those who have left their places, and of those who are there."""
    before = residuals or (None,) * len(state.cache.residuals)
    return tuple(
        p.put_rows(whole, array, state.row, rows=rows)
        for whole, array in zip(before, state.cache.residuals, strict=True)
    )


def _kept(p: Programs, state: Decoding, places_M: np.ndarray) -> Decoding:
    """The state with these places only."""
    places = _one_by_one(lambda array: p.keep[array.ndim == 4](array, places_M), state.replace(slot=None))
    return places.replace(slot=state.slot)


def _one_by_one(change: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Every array changed and the old one given up, so that only one of them lies there twice."""

    def replaced(array: jax.Array) -> jax.Array:
        new = change(array)
        array.delete()
        return new

    return jax.tree.map(replaced, tree)
