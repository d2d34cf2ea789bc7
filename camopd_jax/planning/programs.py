"""A run's programs at their largest shapes: the steps of `method.loop`, with shapes in the place of arrays.

Every program is a jitted function of the run itself, with the arguments that the run gives it. What it returns is asked
of it too (`eval_shape`), and is an argument of the next: no weights are read and no array is made.
"""

import dataclasses
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.method import schedule
from camopd_jax.method import programs as method
from camopd_jax.method.gradient import Gradient, Lesson
from camopd_jax.method.objectives import TeacherReading
from camopd_jax.planning.arrays import Plan, chip_bytes, rows
from camopd_jax.planning.costs import kept_rows, lanes_of, refills, turns
from camopd_jax.rollout import generate
from camopd_jax.rollout.head import head_params
from camopd_jax.rollout.score import LOG_PROB, Reading, empty_record, scoring
from camopd_jax.runtime.buckets import MicroBatch, split_by_length
from camopd_jax.runtime.mesh import batch_shards
from camopd_jax.types import (
    Batch,
    LanguageModel,
    LogProbs,
    Params,
    PromptBatch,
    Prompts,
    Record,
    Rollout,
    Sequences,
    TeacherRecord,
)

# What lies on a chip for a part of a step: the answering model's weights and its cache; what waits from the answers to
# the gradient, residual stream and record of the teacher; the gradient; and what came back from the host's memory
HELD = ("weights", "cache", "residuals", "record", "gradient", "offloaded")
Held = dict[str, Any]  # shapes by kind
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


@dataclass(frozen=True)
class Program:
    """One compiled function of the run."""

    name: str
    jitted: Any
    args: tuple[Any, ...]
    options: dict[str, Any]  # static arguments
    holds: Held  # what lies there meanwhile, arguments or not, and does not lie there through the whole run
    runs: int = 1  # in one step, at most
    trips: int = 1  # of a loop whose bound is data, at most

    @property
    def key(self) -> Hashable:
        """The same for programs that are compiled once."""
        leaves, structure = jax.tree.flatten(self.args)
        return self.jitted.__wrapped__, structure, *leaves, *self.options.items()

    def lower(self) -> jax.stages.Lowered:
        return self.jitted.lower(*self.args, **self.options)

    def returns(self) -> Any:
        """The shapes of its results, where the run leaves them."""
        return self.jitted.eval_shape(*self.args, **self.options)


def programs(p: Plan) -> list[Program]:
    """The programs of a run, in the order of its steps."""
    config = p.setup.config
    teachers = {branch: p.teacher(branch)[0] for branch in config.branches}
    run = method.Programs(p.setup, p.student, p.params, p.eos_ids, p.state, teachers)
    steps = []
    for phase in schedule.phases(config):
        branches = list(config.branches) if phase == schedule.MIXED else [phase]
        steps += _merged(_step(p, run, phase, branches), runs=sum)
    return _merged(steps, runs=max)


def _merged(several: Iterable[Program], runs: Callable[[Iterable[int]], int]) -> list[Program]:
    """Of the programs of one name, as branches have them, the largest."""
    by_name: dict[str, list[Program]] = {}
    for program in several:
        by_name.setdefault(program.name, []).append(program)

    def largest(same: list[Program]) -> Program:
        one = max(same, key=lambda program: chip_bytes((program.args, program.holds)))
        return dataclasses.replace(one, runs=runs(program.runs for program in same))

    return list(map(largest, by_name.values()))


def _and(holds: Held, **more: Any) -> Held:
    return holds | {kind: (holds.get(kind, ()), tree) for kind, tree in more.items()}


# ------------------------------------------------------------------------------------------ one step


def _step(p: Plan, run: method.Programs, phase: str, branches: list[str]) -> Iterator[Program]:
    """`loop.run`, one turn of it."""
    offload, moments = p.setup.config.compute.offload, p.state.moments
    kept: Held = {}
    batches: dict[str, Batch] = {}
    gradients: dict[str, Gradient] = {}
    for name in branches:
        batches[name], kept = yield from _collect(p, run, name, kept)
    holds = _and(kept, offloaded=moments) if offload == "ahead" else kept
    for name, batch in batches.items():
        gradients[name] = yield from _gradient(p, run, name, batch, holds)
        holds = _and(holds, gradient=gradients[name])
    batches = {name: batch.after_gradient() for name, batch in batches.items()}
    mixed = phase == schedule.MIXED
    args = (p.state, gradients, batches) if mixed else (p.state, gradients[phase], batches[phase])
    holds = {"gradient": gradients} | ({"offloaded": moments} if offload != "off" else {})
    yield Program(f"update: {phase}", run.updates[phase], args, {}, holds)


def _collect(p: Plan, run: method.Programs, name: str, kept: Held) -> Generator[Program, None, tuple[Batch, Held]]:
    """`loop.collect`: a branch's batch, and what is kept until the gradient."""
    setup = p.setup
    objective, (teacher, params) = setup.objectives[name], p.teacher(name)
    offloads = setup.config.compute.offload != "off"
    holds = _and(kept, offloaded=params) if offloads else kept
    asked = Prompts(_numbers(setup.rows[name], setup.prompt_slots), _numbers(setup.rows[name]))
    prompts = rows(setup.mesh, PromptBatch(asked, asked, asked.lengths))
    answers = yield from _generate(p, run, name, prompts, holds)
    holds, kept = (_and(lies, residuals=answers.residuals) for lies in (holds, kept))

    sequences, reading = answers.after(prompts.teacher), TeacherReading(objective)
    record = yield from _score(p, f"score: {name} teacher", (teacher, params), sequences, reading, holds)
    of_teacher = record.pop("log_prob")
    head = head_params(teacher, params) if objective.teacher_logits else {}
    waits = record, head if offloads else ()  # else it is the teacher's own
    holds, kept = (_and(lies, record=waits) for lies in (holds, kept))
    sequences = answers.after(prompts.student)
    of_student = yield from _score(p, "score: student", (p.student, p.params), sequences, LOG_PROB, holds)

    log_probs = LogProbs(of_student["log_prob"], of_teacher)
    select = Program(f"select: {name}", run.selecting[name], (log_probs, answers.lengths, NUMBER), {}, kept)
    yield select
    record = TeacherRecord(record, head)
    return Batch(prompts.student, prompts.index, answers, log_probs, select.returns(), record), kept


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _generate(
    p: Plan, run: method.Programs, name: str, prompts: PromptBatch, holds: Held
) -> Generator[Program, None, Rollout]:
    """`method.Programs.generate` and `rollout.generate.answers`."""
    setup, how = p.setup, run.decode
    asked, model, params, of = prompts.student, p.student, p.params, ""
    if setup.config.method.answers == "teacher":
        asked, of, (model, params) = prompts.teacher, f": {name} teacher", p.teacher(name)
    model, jitted = model.on(setup.rollout_mesh), generate.programs(setup.rollout_mesh)
    lanes, total = lanes_of(setup, name), setup.rows[name]
    weights = yield from _reshard(model, params, of, holds)
    holds = _and(holds, weights=weights)
    drawing = {"sampling": how.sampling, "eos_ids": how.eos_ids}
    keys = run.keys.eval_shape(NUMBER, prompts.index)

    def begin(name: str, size: int, holds: Held, runs: int = 1) -> Program:
        args = (model, weights, asked, keys, _numbers(size))
        options = {"max_new": how.max_new, "keep_residuals": how.keep_residuals} | drawing
        return Program(f"{name}{of}", jitted.begin, args, options, holds, runs)

    prefill = begin("prefill", lanes, holds)
    yield prefill
    state = prefill.returns()

    def grow(array: jax.ShapeDtypeStruct, ring: int, holds: Held = holds, runs: int = 1) -> Program:
        options = {"prompt_slots": setup.prompt_slots, "slots": setup.prompt_slots + ring}
        return Program(f"grow{of}", jitted.grow[len(array.shape) == 4], (array, state.slot), options, holds, runs)

    *_, before, last = 0, *generate.rings(how.max_new)
    empty = jax.tree.leaves(state.cache)
    arrays = [grow(array, before).returns() if before else array for array in empty]
    full = state.replace(cache=jax.tree.map(lambda array: grow(array, last).returns(), state.cache))
    widest = max(range(len(arrays)), key=lambda i: chip_bytes(arrays[i]))
    others = [array for i, array in enumerate(jax.tree.leaves(full.cache)) if i != widest]
    alike = sum(array.shape == arrays[widest].shape for array in arrays)
    grown = _and(holds, cache=(full.replace(cache=None), others, arrays[widest]))
    yield grow(arrays[widest], last, grown, runs=alike)

    holds = _and(holds, cache=full)
    times, several = refills(setup, name)
    if times:
        yield begin("refill", several, holds, runs=times)
    args, options = (model, weights, full, NUMBER), {"prompt_slots": setup.prompt_slots} | drawing
    yield Program(f"decode{of}", jitted.advance, args, options, holds, trips=turns(total, lanes, how.max_new))
    answers = jitted.collect.eval_shape(None, full, rows=total)
    return run.move_answers.eval_shape(answers.replace(residuals=full.cache.residuals))


def _reshard(model: LanguageModel, params: Params, of: str, holds: Held) -> Generator[Program, None, Params]:
    """`generate.for_decoding`: each part as the last to move, when all others are there."""
    count, moves = jax.tree.leaves(params["layers"])[0].shape[0], {}
    for part, jitted in generate.moves(model, tuple(params)).items():
        args, runs = ((params[part], NUMBER), count) if part == "layers" else ((params[part],), 1)
        moves[part] = Program(f"reshard{of}: {part}", jitted, args, {}, {}, runs)
    arrived = {part: [move.returns()] * move.runs for part, move in moves.items()}
    for part, move in moves.items():
        yield dataclasses.replace(move, holds=_and(holds, weights=arrived | {part: arrived[part][1:]}))
    return {part: tuple(arrays) if part == "layers" else arrays[0] for part, arrays in arrived.items()}


def _score(
    p: Plan, name: str, scorer: tuple[LanguageModel, Params], sequences: Sequences, reading: Reading, holds: Held
) -> Generator[Program, None, Record]:
    """`score.score_batch`."""
    model, params = scorer
    total, chunk = len(sequences.lengths), p.setup.config.compute.logits_chunk
    parts = _parts(p, total, total, p.setup.score_batch)
    record = rows(p.setup.mesh, jax.eval_shape(partial(empty_record, model, reading=reading), params, sequences))
    args = (model, params, record, sequences, _numbers(*parts[0].rows.shape))
    options = {"widths": parts[0].widths(chunk), "reading": reading}
    waits = {kind: array for kind, array in record.items() if kind != "log_prob"}
    program = Program(name, scoring(p.setup.mesh), args, options, _and(holds, record=waits), runs=len(parts))
    yield program
    return program.returns()


def _gradient(
    p: Plan, run: method.Programs, name: str, batch: Batch, holds: Held
) -> Generator[Program, None, Gradient]:
    """`method.gradient.Learner`, over as many answers as can be selected."""
    learner, total = run.learners[name], p.setup.rows[name]
    parts = _parts(p, total, kept_rows(p.setup, name), p.setup.config.optimizer.micro_batch)
    (part, micro_batches), *others = learner.calls(parts, total)
    weights = run.weighing[name].eval_shape(batch.after_gradient())
    lesson = Lesson(batch.rollout.after(batch.prompts), weights, batch.teacher.tokens, batch.rollout.residuals)
    so_far = learner.begin.eval_shape(p.state.params)
    numbers = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), micro_batches)
    args = (learner.loss, p.params, so_far, lesson, batch.teacher.head, numbers)
    options = {"widths": part.widths(p.setup.config.compute.logits_chunk)}
    holds = _and(holds, gradient=(so_far, weights))
    runs, trips = 1 + len(others), int(micro_batches.count)
    program = Program(f"gradient: {name}", learner.add, args, options, holds, runs, trips)
    yield program
    return program.returns()


def _parts(p: Plan, total: int, taken: int, size: int) -> list[MicroBatch]:
    """Micro-batches of so many of a batch's rows, all as long as can be."""
    setup = p.setup
    widths = setup.prompt_slots, setup.config.rollout.max_response_tokens
    lengths = (np.full(total, width) for width in widths)
    smallest, shards = setup.config.rollout.smallest_bucket, batch_shards(setup.mesh)
    return list(split_by_length(*lengths, np.arange(taken), size, widths, smallest, shards))
