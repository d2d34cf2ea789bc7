"""A run's programs at their largest shapes: the steps of `method.loop`, with shapes in the place of arrays.

Every program is a jitted function of the run itself, with the arguments that the run gives it. The shapes of its
results come from `eval_shape` and are arguments of the next: no weights are read and no array is made.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.method import programs as method
from camopd_jax.method import schedule
from camopd_jax.method.gradient import Gradient, LossInputs
from camopd_jax.method.objectives import TeacherReading
from camopd_jax.planning.arrays import Plan, chip_bytes, rows
from camopd_jax.planning.costs import kept_rows, lanes_of, refills, turns
from camopd_jax.rollout import generate
from camopd_jax.rollout.decode import Decoding
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

# Arrays that are on a chip for a part of a step: the answering model's weights and its cache; what is kept from the
# answers to the gradient, the residual stream and the teacher's record; the gradient; what is back from host memory
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
    holds: Held  # on the chips while it runs, arguments or not, and not through the whole run
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
    config, steps = p.setup.config, []
    teachers: dict[str, LanguageModel] = {branch: p.teacher(branch)[0] for branch in config.branches}
    run = method.Programs(p.setup, p.student, p.params, p.eos_ids, p.state, teachers)
    for phase in schedule.phases(config):
        step = _Step(p, run)
        step.take(phase, list(config.branches) if phase == schedule.MIXED else [phase])
        steps += _merged(step.programs, runs=sum)
    return _merged(steps, runs=max)


def _merged(several: Iterable[Program], runs: Callable[[Iterable[int]], int]) -> list[Program]:
    """Of the programs of one name, as branches have them, the largest."""
    by_name: dict[str, list[Program]] = {}
    for program in several:
        by_name.setdefault(program.name, []).append(program)
    return [
        dataclasses.replace(max(same, key=_bytes), runs=runs(program.runs for program in same))
        for same in by_name.values()
    ]


def _bytes(program: Program) -> int:
    return chip_bytes((program.args, program.holds))


def _and(holds: Held, **more: Any) -> Held:
    return holds | {kind: (holds.get(kind, ()), tree) for kind, tree in more.items()}


def _numbers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class _Step:
    """A step on shapes. Methods are those of the run, and note the programs that it calls."""

    def __init__(self, p: Plan, run: method.Programs):
        self.p, self.run, self.setup, self.config = p, run, p.setup, p.setup.config
        self.compute = self.config.compute
        self.programs: list[Program] = []

    def note(self, program: Program) -> Program:
        self.programs.append(program)
        return program

    def take(self, phase: str, branches: list[str]) -> None:
        """One turn of `loop.run`."""
        kept: Held = {}
        batches: dict[str, Batch] = {}
        gradients: dict[str, Gradient] = {}
        for name in branches:
            batches[name], kept = self.collect(name, kept)
        holds = _and(kept, offloaded=self.p.state.moments) if self.compute.offload == "ahead" else kept
        for name, batch in batches.items():
            gradients[name] = self.gradient(name, batch, holds)
            holds = _and(holds, gradient=gradients[name])
        batches = {name: batch.after_gradient() for name, batch in batches.items()}
        of_branches = (gradients, batches) if phase == schedule.MIXED else (gradients[phase], batches[phase])
        returned = {"offloaded": self.p.state.moments} if self.compute.offloads else {}
        args, holds = (self.p.state, *of_branches), {"gradient": gradients} | returned
        self.note(Program(f"update: {phase}", self.run.updates[phase], args, {}, holds))

    def collect(self, name: str, kept: Held) -> tuple[Batch, Held]:
        """`loop.collect`: a branch's batch, and what is kept until the gradient."""
        objective, (teacher, params) = self.setup.objectives[name], self.p.teacher(name)
        holds = _and(kept, offloaded=params) if self.compute.offloads else kept
        total = self.setup.rows[name]
        tokens = Prompts(_numbers(total, self.setup.prompt_slots), _numbers(total))
        prompts = rows(self.setup.mesh, PromptBatch(tokens, tokens, tokens.lengths))
        answers = self.rollout(name, prompts, holds)
        holds, kept = (_and(lies, residuals=answers.residuals) for lies in (holds, kept))
        sequences, reading = answers.after(prompts.teacher), TeacherReading(objective)
        record = self.score(f"score: {name} teacher", (teacher, params), sequences, reading, holds)
        of_teacher = record.pop("log_prob")
        head = head_params(teacher, params) if objective.teacher_logits else {}
        waits = (record, head) if self.compute.offloads else record  # without, the head is the teacher's own
        holds, kept = (_and(lies, record=waits) for lies in (holds, kept))
        sequences = answers.after(prompts.student)
        of_student = self.score("score: student", (self.p.student, self.p.params), sequences, LOG_PROB, holds)
        log_probs = LogProbs(of_student["log_prob"], of_teacher)
        args = log_probs, answers.lengths, NUMBER
        select = self.note(Program(f"select: {name}", self.run.selecting[name], args, {}, kept))
        batch = Batch(prompts.student, prompts.index, answers, log_probs, select.returns(), TeacherRecord(record, head))
        return batch, kept

    def rollout(self, name: str, prompts: PromptBatch, holds: Held) -> Rollout:
        """`method.Programs.generate` and `rollout.generate.answers`."""
        setup, how, of = self.setup, self.run.decode, ""
        tokens, model, params = prompts.student, self.p.student, self.p.params
        if self.config.method.answers == "teacher":
            tokens, of, (model, params) = prompts.teacher, f": {name} teacher", self.p.teacher(name)
        model, compiled = model.on(setup.rollout_mesh), generate.programs(setup.rollout_mesh)
        weights = self.for_decoding(model, params, of, holds)
        holds = _and(holds, weights=weights)
        drawing = {"sampling": how.sampling, "eos_ids": how.eos_ids}
        keys = self.run.keys.eval_shape(NUMBER, prompts.index)

        def begin(name: str, lanes: int, holds: Held, runs: int = 1) -> Program:
            args = (model, weights, tokens, keys, _numbers(lanes))
            options = drawing | {"max_new": how.max_new, "keep_residuals": how.keep_residuals}
            return self.note(Program(name + of, compiled.begin, args, options, holds, runs))

        lanes = lanes_of(setup, name)
        full = self.grow(compiled, begin("prefill", lanes, holds).returns(), of, holds)
        holds = _and(holds, cache=full)
        times, several = refills(setup, name)
        if times:
            begin("refill", several, holds, runs=times)
        trips = turns(setup.rows[name], lanes, how.max_new)
        args, options = (model, weights, full, NUMBER), drawing | {"prompt_slots": setup.prompt_slots}
        self.note(Program(f"decode{of}", compiled.advance, args, options, holds, trips=trips))
        answers = compiled.collect.eval_shape(None, full, rows=setup.rows[name])
        return self.run.move_answers.eval_shape(answers.replace(residuals=full.cache.residuals))

    def grow(self, compiled: generate.RolloutPrograms, begun: Decoding, of: str, holds: Held) -> Decoding:
        """The cache up to the answers' cap, an array at a time: the widest as the last, when all others have grown."""
        *_, before, last = 0, *generate.rings(self.run.decode.max_new)
        slots = self.setup.prompt_slots

        def grown(array: jax.ShapeDtypeStruct, ring: int, holds: Held, runs: int = 1) -> Program:
            options, jitted = {"prompt_slots": slots, "slots": slots + ring}, compiled.grow[len(array.shape) == 4]
            return Program(f"grow{of}", jitted, (array, begun.slot), options, holds, runs)

        arrays, structure = jax.tree.flatten(begun.cache)
        shorter, longer = ([grown(array, ring, {}).returns() for array in arrays] for ring in (before, last))
        full: Decoding = begun.replace(cache=jax.tree.unflatten(structure, longer))
        widest = max(range(len(arrays)), key=lambda i: chip_bytes(longer[i]))
        array, others = shorter[widest], longer[:widest] + longer[widest + 1 :]
        alike = sum(other.shape == array.shape for other in shorter)
        self.note(grown(array, last, _and(holds, cache=(full.replace(cache=others), array)), alike))
        return full

    def for_decoding(self, model: LanguageModel, params: Params, of: str, holds: Held) -> Params:
        """`generate.for_decoding`: each part as the last to move, when all others are there."""
        count = jax.tree.leaves(params["layers"])[0].shape[0]
        moves = generate.moves(model, tuple(params))
        args = {part: (params[part], NUMBER) if part == "layers" else (params[part],) for part in moves}
        weights = {part: move.eval_shape(*args[part]) for part, move in moves.items()}
        weights["layers"] = (weights["layers"],) * count
        for part, move in moves.items():
            layers = part == "layers"
            others = weights | {part: weights[part][1:] if layers else ()}
            runs = count if layers else 1
            self.note(Program(f"reshard{of}: {part}", move, args[part], {}, _and(holds, weights=others), runs))
        return weights

    def score(
        self, name: str, scorer: tuple[LanguageModel, Params], sequences: Sequences, reading: Reading, holds: Held
    ) -> Record:
        """`score.score_batch`."""
        (model, params), total = scorer, len(sequences.lengths)
        parts = self.micro_batches(total, total, self.setup.score_batch)
        record = rows(self.setup.mesh, jax.eval_shape(partial(empty_record, model, reading=reading), params, sequences))
        holds = _and(holds, record={kind: array for kind, array in record.items() if kind != "log_prob"})
        args = (model, params, record, sequences, _numbers(*parts[0].rows.shape))
        options = {"widths": parts[0].widths(self.config.compute.logits_chunk), "reading": reading}
        return self.note(Program(name, scoring(self.setup.mesh), args, options, holds, runs=len(parts))).returns()

    def gradient(self, name: str, batch: Batch, holds: Held) -> Gradient:
        """`method.gradient.GradientAccumulator`, over as many answers as can be selected."""
        learner, total = self.run.accumulators[name], self.setup.rows[name]
        parts = self.micro_batches(total, kept_rows(self.setup, name), self.config.optimizer.micro_batch)
        (part, first), *others = learner.calls(parts, total)
        weights = self.run.weighing[name].eval_shape(batch.after_gradient())
        lesson = LossInputs(batch.rollout.after(batch.prompts), weights, batch.teacher.tokens, batch.rollout.residuals)
        so_far = learner.begin.eval_shape(self.p.state.params)
        numbers = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), first)
        args = (learner.loss, self.p.params, so_far, lesson, batch.teacher.head, numbers)
        options = {"widths": part.widths(self.config.compute.logits_chunk)}
        holds, runs, trips = _and(holds, gradient=(so_far, weights)), 1 + len(others), int(first.count)
        return self.note(Program(f"gradient: {name}", learner.add, args, options, holds, runs, trips)).returns()

    def micro_batches(self, total: int, taken: int, size: int) -> list[MicroBatch]:
        """Of so many of a batch's rows, all as long as can be."""
        widths = self.setup.prompt_slots, self.config.rollout.max_response_tokens
        prompts, answers = (np.full(total, width) for width in widths)
        smallest, shards = self.config.rollout.smallest_bucket, batch_shards(self.setup.mesh)
        return list(split_by_length(prompts, answers, np.arange(taken), size, widths, smallest, shards))
