"""A run's own programs at their largest shapes, from shapes alone: no weights are read and no array is made.

They are the jitted functions that the run itself calls, `generate.programs`, `scoring.scoring` and those of
`phases.compile_programs`; their arguments are those of `planning.arrays`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.method import loop
from camopd_jax.planning.arrays import (
    Plan,
    abstract_batch,
    abstract_gradient,
    abstract_keys,
    abstract_residuals,
    chip_bytes,
    decoding_params,
    decoding_state,
)
from camopd_jax.planning.costs import kept_rows, learning_pieces, refills, scoring_pieces, turns
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import FIRST_RING
from camopd_jax.types import Batch, LanguageModel, Params

Named = tuple["Program", tuple]  # and what makes it another program than others

# Kinds that lie on a chip for a part of a step. "offloaded": under config.compute.offload, what came back from the host
HELD = ("weights", "cache", "residuals", "gradient", "offloaded")


@dataclass(frozen=True)
class Program:
    """One compiled function of the run."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    # By kind: "parameters", "optimizer", "teacher" and "batch" lie there through the run; "weights" and "cache" while
    # the student answers, "gradient" while it learns, "residuals" from the answers on until it has learnt
    arguments: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)  # by kind: no arguments, and there all the same
    runs: int = 1  # at most, in one step
    trips: int = 1  # of a loop whose bound is data, at most
    same_as: str | None = None  # an earlier program of the very same shapes: compiled once


def programs(p: Plan, eos_ids: tuple[int, ...]) -> Iterator[Program]:
    """The programs of a step, in its order. Those of the same shapes are named, and compiled once."""
    return (_with_offloaded(p, program) for program in _unique(_all(p, eos_ids)))


def _all(p: Plan, eos_ids: tuple[int, ...]) -> Iterator[Named]:
    compiled = loop.compile_programs(p.config, p.student, eos_ids, p.state)
    answer = {"": (p.student, p.state.params)}
    if p.config.method.answers == "teacher":
        answer = {f": {name} teacher": teacher for name, teacher in p.teachers.items()}
    for name, (model, params) in answer.items():
        yield from _rollout(p, compiled, name, model, params)
    yield from _learning(p, compiled)


def _with_offloaded(p: Plan, program: Program) -> Program:
    """With what of the offloaded arrays is on the devices meanwhile: a teacher until all is scored, then moments."""
    offload = p.config.compute.offload
    if offload == "off":
        return program
    teacher = max((params for _, params in p.teachers.values()), key=chip_bytes)
    moments = p.state.moments
    learning = {"gradient": moments if offload == "ahead" else (), "update": moments}
    there = learning.get(program.name.split(":")[0], teacher)
    return dataclasses.replace(program, beside=program.beside | {"offloaded": there})


def _rollout(p: Plan, compiled: loop.Programs, name: str, model: LanguageModel, params: Params) -> Iterator[Named]:
    """The parts of an answer. Between `prefill` and `decode` the cache grows, at last to the cap."""
    parts, decode = generate.programs(p.rollout_mesh), compiled.decode
    model, cap = model.on(p.rollout_mesh), decode.max_new
    weights = decoding_params(model, params)
    drawn = {"sampling": decode.sampling, "eos_ids": decode.eos_ids}
    yield from _reshard(p, name, model, params, weights)

    def state(ring: int) -> Any:
        return decoding_state(model, p.places, p.prompt_slots, ring, cap, decode.keep_residuals)

    def prefill(name: str, rows: int, **more: Any) -> Named:
        asked = p.batch.prompts, abstract_keys(p.rows, p.mesh)
        args = (model, weights, *asked, jax.ShapeDtypeStruct((rows,), jnp.int32))
        options = drawn | {"max_new": cap, "keep_residuals": decode.keep_residuals}
        return _program(name, parts.begin, args, {"weights": weights, "batch": asked}, options, **more)

    yield prefill(f"prefill{name}", p.places)
    full = state(cap)
    if p.places < p.rows:
        times, several = refills(p.rows, p.places, dict(p.rollout_mesh.shape))
        yield prefill(f"refill{name}", several, beside={"cache": full}, runs=times)
    if cap > FIRST_RING:
        shorter = state(FIRST_RING * 2 ** (math.ceil(math.log2(cap / FIRST_RING)) - 1))
        one, others = shorter.cache.keys[0], full.replace(cache=full.cache.replace(keys=full.cache.keys[1:]))
        sizes = {"prompt_slots": p.prompt_slots, "slots": p.prompt_slots + cap}
        yield _program(f"grow{name}", parts.grow[True], (one, shorter.slot), {"cache": one}, sizes,
                       beside={"weights": weights, "cache": others}, runs=2 * len(full.cache.keys))  # fmt: skip
    yield _program(
        f"decode{name}", parts.advance, (model, weights, full, jax.ShapeDtypeStruct((), jnp.int32)),
        {"weights": weights, "cache": full}, drawn | {"prompt_slots": p.prompt_slots},
        trips=turns(p.rows, p.places, cap),
    )  # fmt: skip


def _reshard(p: Plan, name: str, model: LanguageModel, params: Params, weights: Params) -> Iterator[Named]:
    """A layer, and each array of no layer, as the last to move: all others are there."""
    kind, number = "teacher" if name else "parameters", jax.ShapeDtypeStruct((), jnp.int32)
    for part, jitted in generate.moves(model, tuple(params)).items():
        there = {other: array for other, array in weights.items() if other != part}
        args, runs = (params[part],), 1
        if part == "layers":
            there, args, runs = (there, weights["layers"][1:]), (params["layers"], number), model.config.num_layers
        yield _program(f"reshard{name}: {part}", jitted, args, {kind: params[part]}, beside={"weights": there},
                       runs=runs)  # fmt: skip


def _learning(p: Plan, compiled: loop.Programs) -> Iterator[Named]:
    """What acts on finished answers: a micro-batch of rows at a time, then all."""
    batch, said, config = p.batch, p.batch.rollout, p.config
    chunk = config.compute.logits_chunk
    scored_M = jax.ShapeDtypeStruct((loop.score_batch(config),), jnp.int32)
    learnt_1M = jax.ShapeDtypeStruct((1, config.optimizer.micro_batch), jnp.int32)
    widest = {"slots": p.slots, "answer_slots": said.tokens.shape[1], "chunk": chunk}
    scoring = {"student": (p.student, p.state.params)} | {
        f"{name} teacher": teacher for name, teacher in p.teachers.items() if _teaches(p, name)
    }
    asked = batch.prompts, said.tokens, said.lengths
    mixed = "mixed" in compiled.update
    residuals, of_the_other = (), ()
    if compiled.decode.keep_residuals:
        residuals = abstract_residuals(p, p.rows)
        of_the_other = abstract_residuals(p, config.rollout.batch_size - p.rows) if mixed else ()
    wait = {"residuals": (residuals, of_the_other)}
    for name, (model, params) in scoring.items():
        kind = "parameters" if name == "student" else "teacher"
        scored = batch.scores.student
        yield _program(f"score: {name}", scoring.scoring(p.mesh), (model, params, scored, *asked, scored_M),
                       {kind: params, "batch": (scored, *asked)}, widest | {"with_top": False}, beside=wait,
                       runs=_scorings(p, name))  # fmt: skip
    draw = jax.ShapeDtypeStruct((), jnp.int32)
    for name in loop.BRANCHES:
        yield _program(f"select: {name}", compiled.select[name], (batch.scores, said.lengths, draw),
                       {"batch": (batch.scores, said.lengths)}, beside=wait)  # fmt: skip
    params, sum_so_far = p.state.params, abstract_gradient(p.state.params)
    asked = (*asked, batch.scores.student)
    learnt = [learning_pieces(config, kept_rows(config, name)) for name in loop.BRANCHES]
    yield _program(
        "gradient", compiled.learning.add, (p.student, params, sum_so_far, *asked, residuals, learnt_1M, draw),
        {"parameters": params, "gradient": sum_so_far, "batch": asked, "residuals": residuals}, widest,
        beside={"gradient": sum_so_far, "residuals": of_the_other} if mixed else {},
        runs=sum(learnt) if mixed else max(learnt),
    )  # fmt: skip
    for name, update in compiled.update.items():
        parts = _parts(p, name)
        sums = (sum_so_far,) * len(parts)
        adam = p.state.moments, p.state.step, p.state.skipped
        yield _program(f"update: {name}", update, (p.state, *sums, *parts),
                       {"parameters": params, "optimizer": adam, "gradient": sums, "batch": parts})  # fmt: skip


def _teaches(p: Plan, name: str) -> bool:
    return name == "general" or p.config.method.domain_teacher == "specialised"


def _scorings(p: Plan, name: str) -> int:
    """Pieces that a model scores in a step."""
    rows, method = loop.batch_rows(p.config), p.config.method
    if method.schedule == "alternate":
        return scoring_pieces(p.config, p.rows)
    teacher = {"recovery": "general teacher", "review": f"{method.domain_teacher} teacher"}
    return sum(scoring_pieces(p.config, n) for branch, n in rows.items() if name in ("student", teacher[branch]))


def _parts(p: Plan, update: str) -> tuple[Batch, ...]:
    if update != "mixed":
        return (p.batch,)
    answers = p.batch.rollout.tokens.shape[1]
    return tuple(abstract_batch(p.mesh, n, p.prompt_slots, answers) for n in loop.batch_rows(p.config).values())


def _program(
    name: str, jitted: Any, args: tuple, arguments: dict[str, Any], options: dict[str, Any] | None = None, **more: Any
) -> Named:
    options = options or {}
    key = (id(jitted), *jax.tree.leaves(args), *options.items())
    return Program(name, lambda: jitted.lower(*args, **options), arguments, **more), key


def _unique(named: Iterator[Named]) -> Iterator[Program]:
    seen: dict[str, str] = {}
    for program, key in named:
        first = seen.setdefault(repr(key), program.name)
        yield program if first == program.name else dataclasses.replace(program, same_as=first)
