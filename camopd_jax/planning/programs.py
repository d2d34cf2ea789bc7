"""A run's programs at their largest shapes: the steps of `method.loop`, with shapes in place of arrays.

Every program is a jitted function of the run itself, with the arguments that the run gives it. The shapes of its
results come from `eval_shape` and are arguments of the next: no weights are read and no array is made.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.method import programs as method
from camopd_jax.method import schedule
from camopd_jax.method.gradient import Gradient, LossInputs
from camopd_jax.method.objectives import TeacherReading
from camopd_jax.planning.arrays import Plan, chip_bytes, rows, without_shared
from camopd_jax.planning.costs import kept_rows, lanes_of, refills, waves_of
from camopd_jax.rollout import generate
from camopd_jax.rollout.decode import Decoding
from camopd_jax.rollout.head import head_params
from camopd_jax.rollout.score import LOG_PROB, Reading, empty_record, scoring
from camopd_jax.runtime.buckets import MicroBatch, split_by_length
from camopd_jax.runtime.mesh import batch_shards
from camopd_jax.types import Batch, LogProbs, Params, PromptBatch, Prompts, Record, Rollout, Sequences, TeacherRecord

Held = Counter[str]  # bytes on one chip, by kind


def held(**trees: Any) -> Held:
    """Bytes on one chip of arrays of each kind.

    Kinds of a part of a step are the "weights" and the "cache" of the model that answers; the "residuals" and the
    teacher's "record", from the answers to the gradient; the "gradient"; and copies of what is "offloaded".
    """
    return Counter({kind: chip_bytes(tree) for kind, tree in trees.items()})


@dataclass(frozen=True)
class Program:
    """One compiled function of the run."""

    name: str
    jitted: Any
    args: tuple[Any, ...]
    holds: Held  # during a call, arguments included, without `residents`
    options: dict[str, Any] = field(default_factory=dict)  # static arguments
    runs: int = 1  # calls for one batch, at most
    trips: int = 1  # iterations of a loop whose bound is data, at most

    @property
    def key(self) -> Hashable:
        """Equal for programs that are compiled once."""
        leaves, structure = jax.tree.flatten(self.args)
        return self.jitted.__wrapped__, structure, *leaves, *self.options.items()

    def lower(self) -> jax.stages.Lowered:
        return self.jitted.lower(*self.args, **self.options)

    def returns(self) -> Any:
        """The shapes and shardings of its results."""
        return self.jitted.eval_shape(*self.args, **self.options)


def programs(p: Plan) -> list[Program]:
    """The programs of a run, in the order of its steps; of those of one name, which branches share, the largest."""
    config = p.setup.config
    teachers: Any = {branch: p.teacher(branch)[0] for branch in config.branches}
    run = method.Programs(p.setup, p.student, p.params, p.eos_ids, p.state, teachers)
    largest: dict[str, Program] = {}
    for phase in schedule.phases(config):
        step = _Step(p, run)
        step.take(phase, list(config.branches) if phase == schedule.MIXED else [phase])
        for program in step.programs:
            largest[program.name] = max(largest.get(program.name, program), program, key=_bytes)
    return list(largest.values())


def _bytes(program: Program) -> int:
    return chip_bytes(program.args) + program.holds.total()


def residents(p: Plan, several: Sequence[Program]) -> dict[str, int]:
    """Bytes on one chip through the whole run, without code: the student and its optimizer, the teachers, the answers
    of a step and of the one before, which the host still reads.
    """
    config, phases = p.setup.config, schedule.phases(p.setup.config)
    acting = {of.teacher for name, of in config.branches.items() if name in phases or schedule.MIXED in phases}
    kept: dict[str, Any] = {}
    for name, (_, params) in p.teachers.items():
        kept[f"{name}_teacher"] = without_shared(params, p.params, *kept.values())
    kept |= {"optimizer": (p.state.moments, p.state.step)}
    if config.compute.offloads:
        kept |= {"optimizer": (), **{f"{name}_teacher": () for name in acting}}
    batches = [chip_bytes(program.args[-1]) for program in several if program.name.startswith("update")]
    return dict(held(parameters=p.params, **kept), answers=2 * max(batches))


def _numbers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class _Step:
    """A step on shapes. The methods are those of the run; each notes the programs that it calls."""

    def __init__(self, p: Plan, run: method.Programs):
        self.p, self.run, self.setup, self.config = p, run, p.setup, p.setup.config
        self.programs: list[Program] = []

    def note(self, *fields: Any, **more: Any) -> Program:
        self.programs.append(Program(*fields, **more))
        return self.programs[-1]

    def take(self, phase: str, branches: list[str]) -> None:
        """One turn of `loop.run`."""
        kept, compute = Held(), self.config.compute
        batches: dict[str, Batch] = {}
        gradients: dict[str, Gradient] = {}
        for name in branches:
            batches[name], kept = self.collect(name, kept)
        moments = held(offloaded=self.p.state.moments if compute.offloads else ())
        for name, batch in batches.items():
            holds = kept + held(gradient=gradients) + (moments if compute.offload == "ahead" else Held())
            gradients[name] = self.gradient(name, batch, holds)
        batches = {name: batch.after_gradient() for name, batch in batches.items()}
        of_branches = (gradients, batches) if phase == schedule.MIXED else (gradients[phase], batches[phase])
        args = self.p.state, *of_branches
        self.note(f"update: {phase}", self.run.updates[phase], args, held(gradient=gradients) + moments)

    def collect(self, name: str, kept: Held) -> tuple[Batch, Held]:
        """`loop.collect`: a branch's batch, and the arrays kept until the gradient."""
        objective, (teacher, params) = self.setup.objectives[name], self.p.teacher(name)
        offloads, total = self.config.compute.offloads, self.setup.rows[name]
        copy = held(offloaded=without_shared(params, self.p.params) if offloads else ())
        tokens = Prompts(_numbers(total, self.setup.prompt_slots), _numbers(total))
        prompts = rows(self.setup.mesh, PromptBatch(tokens, tokens, tokens.lengths))
        answers = self.rollout(name, prompts, kept + copy)
        kept = kept + held(residuals=answers.residuals)
        sequences, reading = answers.after(prompts.teacher), TeacherReading(objective)
        record = self.score(f"score: {name} teacher", (teacher, params), sequences, reading, kept + copy)
        of_teacher = record.pop("log_prob")
        head = head_params(teacher, params) if objective.teacher_logits else {}
        kept = kept + held(record=(record, head if offloads else ()))  # without offloading, it is the teacher's own
        sequences = answers.after(prompts.student)
        of_student = self.score("score: student", (self.p.student, self.p.params), sequences, LOG_PROB, kept + copy)
        log_probs = LogProbs(of_student["log_prob"], of_teacher)
        select = self.note(f"select: {name}", self.run.selecting[name], (log_probs, answers.lengths, _numbers()), kept)
        batch = Batch(prompts.student, prompts.index, answers, log_probs, select.returns(), TeacherRecord(record, head))
        return batch, kept

    def rollout(self, name: str, prompts: PromptBatch, holds: Held) -> Rollout:
        """`method.Programs.generate` and `rollout.generate.answers`."""
        setup, how, of, total = self.setup, self.run.decode, "", self.setup.rows[name]
        tokens, model, params = prompts.student, self.p.student, self.p.params
        if self.config.method.answers == "teacher":
            tokens, of, (model, params) = prompts.teacher, f": {name} teacher", self.p.teacher(name)
        model, compiled = model.on(setup.rollout_mesh), generate.programs(setup.rollout_mesh)
        weights = self.for_decoding(model, params, of, holds)
        holds = holds + held(weights=weights)
        drawing = {"sampling": how.sampling, "eos_ids": how.eos_ids}
        options = drawing | {"max_new": how.max_new, "keep_residuals": how.keep_residuals}
        args = (model, weights, tokens, self.run.keys.eval_shape(_numbers(), prompts.index))
        lanes, (times, entering) = lanes_of(setup, total), refills(setup, total)
        begin = self.note(f"prefill{of}", compiled.begin, (*args, _numbers(lanes)), holds, options)
        full = self.grow(compiled, begin.returns(), of, holds)
        holds = holds + held(cache=full)
        if times:
            self.note(f"refill{of}", compiled.begin, (*args, _numbers(entering)), holds, options, runs=times)
        trips, options = waves_of(setup, total) * how.max_new, drawing | {"prompt_slots": setup.prompt_slots}
        state = (model, weights, full, _numbers())
        self.note(f"decode{of}", compiled.advance, state, holds, options, trips=trips)
        answers = compiled.collect.eval_shape(None, full, rows=total)
        return self.run.move_answers.eval_shape(answers.replace(residuals=full.cache.residuals))

    def grow(self, compiled: generate.RolloutPrograms, begun: Decoding, of: str, holds: Held) -> Decoding:
        """The cache up to the answers' cap, an array at a time: the widest last, when all others have grown."""
        *_, before, last = 0, *generate.rings(self.run.decode.max_new)
        slots = self.setup.prompt_slots

        def grown(array: jax.ShapeDtypeStruct, ring: int) -> jax.ShapeDtypeStruct:
            longer = compiled.grow[array.ndim == 4].eval_shape
            return longer(array, begun.slot, prompt_slots=slots, slots=slots + ring)

        arrays, structure = jax.tree.flatten(begun.cache)
        shorter, longer = ([grown(array, ring) for array in arrays] for ring in (before, last))
        full: Decoding = begun.replace(cache=jax.tree.unflatten(structure, longer))
        new, old = max(zip(longer, shorter, strict=True), key=chip_bytes)
        holds = holds + held(cache=(full, old)) - held(cache=new)  # the new array is an output
        options, alike = {"prompt_slots": slots, "slots": slots + last}, sum(x.shape == old.shape for x in shorter)
        args = old, begun.slot
        self.note(f"grow{of}", compiled.grow[old.ndim == 4], args, holds, options, runs=alike)
        return full

    def for_decoding(self, model: Any, params: Params, of: str, holds: Held) -> Params:
        """`generate.for_decoding`: each part as the last to move, when all others have moved."""
        count = jax.tree.leaves(params["layers"])[0].shape[0]
        moves = generate.moves(model, tuple(params))
        args = {part: (params[part], _numbers()) if part == "layers" else (params[part],) for part in moves}
        moved = {part: move.eval_shape(*args[part]) for part, move in moves.items()}
        weights = moved | {"layers": (moved["layers"],) * count}
        for part, move in moves.items():
            others = holds + held(weights=weights) - held(weights=moved[part])
            self.note(f"reshard{of}: {part}", move, args[part], others, runs=count if part == "layers" else 1)
        return weights

    def score(
        self, name: str, scorer: tuple[Any, Params], sequences: Sequences, reading: Reading, holds: Held
    ) -> Record:
        """`score.score_batch`."""
        (model, params), total = scorer, len(sequences.lengths)
        parts = self.micro_batches(total, total, self.setup.score_batch)
        record = rows(self.setup.mesh, jax.eval_shape(partial(empty_record, model, reading=reading), params, sequences))
        args = (model, params, record, sequences, _numbers(*parts[0].rows.shape))
        options = {"widths": parts[0].widths(self.config.compute.logits_chunk), "reading": reading}
        holds = holds + held(record={kind: array for kind, array in record.items() if kind != "log_prob"})
        return self.note(name, scoring(self.setup.mesh), args, holds, options, runs=len(parts)).returns()

    def gradient(self, name: str, batch: Batch, holds: Held) -> Gradient:
        """`method.gradient.GradientAccumulator`, over as many answers as can be selected."""
        accumulator, total = self.run.accumulators[name], self.setup.rows[name]
        parts = self.micro_batches(total, kept_rows(self.setup, name), self.config.optimizer.micro_batch)
        (part, first), *others = accumulator.calls(parts, total)
        weights = self.run.weighing[name].eval_shape(batch.after_gradient())
        inputs = LossInputs(batch.rollout.after(batch.prompts), weights, batch.teacher.tokens, batch.rollout.residuals)
        so_far = accumulator.begin.eval_shape(self.p.state.params)
        numbers = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), first)
        args = (accumulator.loss, self.p.params, so_far, inputs, batch.teacher.head, numbers)
        holds = holds + held(gradient=(so_far, weights))
        more = {"options": {"widths": part.widths(self.config.compute.logits_chunk)}, "runs": 1 + len(others)}
        return self.note(f"gradient: {name}", accumulator.add, args, holds, trips=int(first.count), **more).returns()

    def micro_batches(self, total: int, taken: int, size: int) -> list[MicroBatch]:
        """Of `taken` of a batch's `total` rows, all of the largest length."""
        widths = self.setup.prompt_slots, self.config.rollout.max_response_tokens
        prompts, answers = (np.full(total, width) for width in widths)
        smallest, shards = self.config.rollout.smallest_bucket, batch_shards(self.setup.mesh)
        return list(split_by_length(prompts, answers, np.arange(taken), size, widths, smallest, shards))
