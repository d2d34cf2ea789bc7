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

from camopd_jax.method import schedule
from camopd_jax.method.gradient import Gradient, LossInputs
from camopd_jax.planning.arrays import Plan, chip_bytes, rows, without_shared
from camopd_jax.planning.costs import kept_rows, lanes_of, refills, waves_of
from camopd_jax.rollout import generate
from camopd_jax.rollout.decode import Decoding
from camopd_jax.rollout.head import head_params
from camopd_jax.rollout.paired import Pair, PairedPrompts
from camopd_jax.rollout.score import NOTHING, Reading, empty_record, scoring
from camopd_jax.runtime.buckets import MicroBatch, split_by_length
from camopd_jax.runtime.mesh import batch_shards
from camopd_jax.types import Batch, LogProbs, Params, PromptBatch, Prompts, Record, Rollout, Sequences, TeacherRecord


@dataclass(frozen=True)
class Program:
    """One compiled function of the run."""

    name: str
    jitted: Any
    args: tuple[Any, ...]
    holds: Counter[str]  # bytes on one chip by kind, during a call, arguments included, without `residents`
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
    largest: dict[str, Program] = {}
    for phase in schedule.phases(p.setup.config):
        step = _Step(p)
        step.take(phase)
        for program in step.programs:
            largest[program.name] = max(largest.get(program.name, program), program, key=_bytes)
    return list(largest.values())


def programs_of_start(p: Plan) -> list[Program]:
    """The programs with which a run begins: those of `programs`, and decoding with each size of the cache."""
    several: dict[Hashable, Program] = {}
    for phase in schedule.phases(p.setup.config):
        for ring in generate.rings(p.run.decode.max_new):
            step = _Step(p, ring)
            step.take(phase)
            several |= {program.key: program for program in step.programs}
    return list(several.values())


def _bytes(program: Program) -> int:
    return chip_bytes(program.args) + program.holds.total()


def residents(p: Plan, several: Sequence[Program]) -> dict[str, int]:
    """Bytes on one chip through the whole run, without code: the student and its optimizer, the teachers, the answers
    of a step and of the one before, which the host still reads.
    """
    config, phases = p.setup.config, schedule.phases(p.setup.config)
    acting = {of.teacher for name, of in config.branches.items() if name in phases or schedule.MIXED in phases}
    kept: dict[str, Any] = {"parameters": p.params}
    for name, (_, params) in p.teachers.items():
        kept[f"{name}_teacher"] = without_shared(params, *kept.values())
    kept |= {"optimizer": (p.state.moments, p.state.average, p.state.step)}
    if config.compute.offloads:
        kept |= {"optimizer": (), **{f"{name}_teacher": () for name in acting}}
    batches = [chip_bytes(program.args[-1]) for program in several if program.name.startswith("update")]
    return {kind: chip_bytes(arrays) for kind, arrays in kept.items()} | {"answers": 2 * max(batches)}


def _numbers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class _Step:
    """A step on shapes. The methods are those of the run; each notes the programs that it calls.

    `chip` has the arrays that only a part of a step needs, while they are in memory: the "weights" and the "cache" of
    the model that answers; the "residuals" and the teacher's "record", from the answers to the gradient; the
    "gradient"; and copies of what is "offloaded".
    """

    def __init__(self, p: Plan, ring: int | None = None):
        """`ring`: slots of the cache after the prompts (`generate.rings`) when answers are decoded; None: the most."""
        self.ring = ring or p.run.decode.max_new
        self.p, self.run, self.setup, self.config = p, p.run, p.setup, p.setup.config
        self.chip: dict[str, Any] = dict.fromkeys(("residuals", "record", "offloaded"), ())
        self.programs: list[Program] = []

    def note(self, name: str, jitted: Any, args: tuple[Any, ...], chip: Any = (), **more: Any) -> Program:
        """Adds a program. `chip`: kinds that have other arrays during this call. `more`: other fields of `Program`."""
        arrays = self.chip | dict(chip)
        holds = Counter({kind: n for kind, tree in arrays.items() if (n := chip_bytes(tree))})
        self.programs.append(Program(name, jitted, args, holds, **more))
        return self.programs[-1]

    def take(self, phase: str) -> None:
        """One turn of `loop.run`."""
        compute, state = self.config.compute, self.p.state
        branches = self.config.branches if phase == schedule.MIXED else [phase]
        batches = {name: self.collect(name) for name in branches}
        moments = (state.moments, state.average) if compute.offloads else ()
        gradients: dict[str, Gradient] = {}
        self.chip |= {"offloaded": moments if compute.offload == "ahead" else (), "gradient": gradients}
        for name, batch in batches.items():
            gradients[name] = self.gradient(name, batch)
        batches = {name: batch.after_gradient() for name, batch in batches.items()}
        of_branches = (gradients, batches) if phase == schedule.MIXED else (gradients[phase], batches[phase])
        self.chip = {"offloaded": moments, "gradient": gradients}
        self.note(f"update: {phase}", self.run.updates[phase], (state, *of_branches))

    def collect(self, name: str) -> Batch:
        """`loop.collect`: a branch's batch. `chip` keeps its residual stream and record."""
        objective, (teacher, params) = self.setup.objectives[name], self.p.teacher(name)
        offloads, total = self.config.compute.offloads, self.setup.rows[name]
        self.chip["offloaded"] = without_shared(params, self.p.params) if offloads else ()
        tokens = Prompts(_numbers(total, self.setup.prompt_slots), _numbers(total))
        prompts = rows(self.setup.mesh, PromptBatch(tokens, tokens, tokens.lengths))
        answers = self.rollout(name, prompts)
        self.chip["residuals"] = self.chip["residuals"], answers.residuals
        sequences, reading = answers.after(prompts.teacher), self.setup.reading(name)
        record = self.score(f"score: {name} teacher", teacher, params, sequences, reading)
        of_teacher = record.pop("log_prob")
        head = head_params(teacher, params) if objective.teacher_logits else {}
        copied = head if offloads else ()  # without offloading, it is the teacher's own
        self.chip["record"] = self.chip["record"], record, copied
        sequences, of_student = answers.after(prompts.student), self.run.readings[name]
        given = TeacherRecord(record, head) if objective.second_pass else NOTHING
        label = f"score: {name} student" if objective.second_pass else "score: student"
        scored = self.score(label, self.p.student, self.p.params, sequences, of_student, given)
        self.chip["offloaded"] = ()
        log_probs = LogProbs(scored.pop("log_prob"), of_teacher)
        self.chip["record"] = self.chip["record"], scored
        record = record | scored
        select = self.note(f"select: {name}", self.run.selecting[name], (log_probs, answers.lengths, _numbers()))
        return Batch(prompts.student, prompts.index, answers, log_probs, select.returns(), TeacherRecord(record, head))

    def rollout(self, name: str, prompts: PromptBatch) -> Rollout:
        """`method.Programs.generate` and `rollout.generate.answers`."""
        setup, how, of, total = self.setup, self.run.decode, "", self.setup.rows[name]
        tokens: Any = prompts.student
        model: Any = self.p.student
        params = self.p.params
        if self.config.rollout.sampler != "student":
            teacher, of_teacher = self.p.teacher(name)
            model, params, tokens = Pair(model, teacher), (params, of_teacher), PairedPrompts.of(prompts)
        elif self.config.method.answers == "teacher":
            tokens, of, (model, params) = prompts.teacher, f": {name} teacher", self.p.teacher(name)
        model = model.on(setup.rollout_mesh)
        compiled = generate.programs_of(model)
        if isinstance(model, Pair):
            student = self.for_decoding(model.student, params[0], of)
            weights = student, self.for_decoding(model.teacher, params[1], f": {name} teacher", student)
        else:
            weights = self.for_decoding(model, params, of)
        self.chip["weights"] = weights
        drawing = {"sampling": how.sampling, "eos_ids": how.eos_ids}
        options = drawing | how.of_begin
        args = (model, weights, tokens, self.run.keys.eval_shape(_numbers(), prompts.index))
        lanes, (times, entering) = lanes_of(setup, total), refills(setup, total)
        begin = self.note(f"prefill{of}", compiled.begin, (*args, _numbers(lanes)), options=options)
        self.chip["cache"] = full = self.grow(compiled, begin.returns(), of)
        if times:
            self.note(f"refill{of}", compiled.begin, (*args, _numbers(entering)), options=options, runs=times)
        trips, options = waves_of(setup, total) * how.max_new, drawing | {"prompt_slots": setup.prompt_slots}
        self.note(f"decode{of}", compiled.advance, (model, weights, full, _numbers()), options=options, trips=trips)
        del self.chip["weights"], self.chip["cache"]
        answers = compiled.collect.eval_shape(None, full, rows=total)
        return self.run.move_answers.eval_shape(answers.replace(residuals=full.cache.residuals))

    def for_decoding(self, model: Any, params: Params, of: str, beside: Params = ()) -> Params:
        """`generate.for_decoding`: each part as the last to move, when all others have moved, `beside` another model's
        weights.
        """
        of_layers = [generate.layer_move(attention) for attention in model.layer_attention]
        moves = generate.moves(model, tuple(params))
        layer = (params["layers"], _numbers())
        args = {part: layer if part in of_layers else (params[part],) for part in moves}
        moved = {part: (move.eval_shape(*args[part]),) * max(1, of_layers.count(part)) for part, move in moves.items()}
        for part, move in moves.items():
            others = moved | {part: moved[part][1:]}
            chip = {"weights": (others, beside)}
            self.note(f"reshard{of}: {part}", move, args[part], chip, runs=len(moved[part]))
        others = {part: arrays[0] for part, arrays in moved.items() if part not in of_layers}
        return others | {"layers": tuple(moved[part][0] for part in of_layers)}

    def grow(self, compiled: generate.RolloutPrograms, begun: Decoding, of: str) -> Decoding:
        """The cache with `ring` slots, an array at a time: the widest last, when all others have grown."""
        sizes = [0, *generate.rings(self.run.decode.max_new)]
        before, last = sizes[sizes.index(self.ring) - 1], self.ring
        slots = self.setup.prompt_slots

        def grown(array: jax.ShapeDtypeStruct, ring: int) -> jax.ShapeDtypeStruct:
            longer = compiled.grow[array.ndim == 4].eval_shape
            return longer(array, begun.slot, prompt_slots=slots, slots=slots + ring)

        arrays, structure = jax.tree.flatten(begun.cache)
        shorter, longer = ([grown(array, ring) for array in arrays] for ring in (before, last))
        full: Decoding = begun.replace(cache=jax.tree.unflatten(structure, longer))
        new, old = max(zip(longer, shorter, strict=True), key=chip_bytes)
        others = jax.tree.leaves(full)
        others.remove(new)  # an output of the program
        options, alike = {"prompt_slots": slots, "slots": slots + last}, sum(x.shape == old.shape for x in shorter)
        program = compiled.grow[old.ndim == 4]
        self.note(f"grow{of}", program, (old, begun.slot), {"cache": (others, old)}, options=options, runs=alike)
        return full

    def score(
        self,
        name: str,
        model: Any,
        params: Params,
        sequences: Sequences,
        reading: Reading,
        given: TeacherRecord = NOTHING,
    ) -> Record:
        """`score.score_batch`."""
        total = len(sequences.lengths)
        parts = self.micro_batches(total, total, self.setup.score_batch)
        empty = partial(empty_record, model, reading=reading)
        record = rows(self.setup.mesh, jax.eval_shape(empty, params, sequences, given=given))
        args = (model, params, record, sequences, _numbers(*parts[0].rows.shape), given)
        options = {"widths": parts[0].widths(self.config.compute.logits_chunk), "reading": reading}
        more = {kind: array for kind, array in record.items() if kind != "log_prob"}
        chip = {"record": (self.chip["record"], more)}
        return self.note(name, scoring(self.setup.mesh), args, chip, options=options, runs=len(parts)).returns()

    def gradient(self, name: str, batch: Batch) -> Gradient:
        """`method.gradient.GradientAccumulator`, over as many answers as can be selected."""
        accumulator, total = self.run.accumulators[name], self.setup.rows[name]
        parts = self.micro_batches(total, kept_rows(self.setup, name), self.setup.micro_batch)
        (part, first), *others = accumulator.calls(parts, total)
        weights = self.run.weighing[name].eval_shape(batch, _numbers())
        recording, constants = self.run.recording.get(name), batch.teacher.tokens
        if recording is not None:
            constants = recording.eval_shape(batch, state=self.p.state.objectives.get(name, {}))
        inputs = LossInputs(batch.rollout.after(batch.prompts), weights, constants, batch.rollout.residuals)
        so_far = accumulator.begin.eval_shape(self.p.state.params)
        numbers = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), first)
        args = (accumulator.loss, self.p.params, so_far, inputs, batch.teacher.head, numbers)
        chip = {"gradient": (self.chip["gradient"], so_far, weights)}
        more = {"options": {"widths": part.widths(self.config.compute.logits_chunk)}, "runs": 1 + len(others)}
        return self.note(f"gradient: {name}", accumulator.add, args, chip, trips=int(first.count), **more).returns()

    def micro_batches(self, total: int, taken: int, size: int) -> list[MicroBatch]:
        """Of `taken` of a batch's `total` rows, all of the largest length."""
        widths = self.setup.prompt_slots, self.config.rollout.max_response_tokens
        prompts, answers = (np.full(total, width) for width in widths)
        smallest, shards = self.config.rollout.smallest_bucket, batch_shards(self.setup.mesh)
        return list(split_by_length(prompts, answers, np.arange(taken), size, widths, smallest, shards))
