"""The compiled functions of a step. Each call also chooses the mesh, measures the time and moves offloaded arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.inference.loading import Loaded
from camopd_jax.method import schedule
from camopd_jax.method.branches import Branch, offload_teachers
from camopd_jax.method.gradient import Gradient, GradientAccumulator, Loss, LossInputs
from camopd_jax.method.objectives import StudentReading
from camopd_jax.method.select import among_first, select
from camopd_jax.method.setup import Setup
from camopd_jax.method.update import Metrics, branch_update, mixed_update
from camopd_jax.method.weights import loss_record, token_weights
from camopd_jax.models.partition import merge
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.head import head_params
from camopd_jax.rollout.paired import Pair, PairedPrompts
from camopd_jax.rollout.sampling import row_keys, sampling_of
from camopd_jax.rollout.score import LOG_PROB, NOTHING, Reading, micro_batches, score_batch
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.mesh import gather, global_rows, sharding
from camopd_jax.runtime.offload import OffloadSlot
from camopd_jax.runtime.timing import Stages
from camopd_jax.types import (
    Batch,
    LanguageModel,
    LogProbs,
    Params,
    PromptBatch,
    Prompts,
    Record,
    Rollout,
    Selection,
    Sequences,
    TeacherRecord,
    TrainState,
)

# If the student's log-probabilities are those from sampling: steps between two comparisons with a forward pass
COMPARE_EVERY = 16
# Folded into the random keys of token weights, with the branch's number; those of sampling have a token's slot there
WEIGHT_KEYS = 2**30


class Programs:
    """All compiled functions of a run. Each one compiles once per shape bucket.

    The trained parameters are read from a `TrainState`; the frozen ones are stored here.
    """

    def __init__(
        self,
        setup: Setup,
        model: LanguageModel,
        params: Params,
        eos_ids: tuple[int, ...],
        state: TrainState,
        teachers: dict[str, LanguageModel],
    ):
        """Jits the functions. Each update keeps the sharding of the state and donates its arrays.

        Args:
          model, params: of the student. If functions are only compiled, params and state may be shapes with shardings.
          teachers: the teacher of each branch.
        """
        config = setup.config
        self.setup, self.model, self.stages = setup, model, Stages()
        self._params = params
        self._idle = OffloadSlot()  # of the optimizer's arrays, which only the update needs
        self.decode = Decode(
            sampling_of(config.rollout),
            eos_ids,
            config.rollout.max_response_tokens,
            config.rollout.concurrency,
            config.rollout.shrinks,
            setup.keep_residuals,
            config.rollout.answers_per_prompt,
        )
        rows: Any = None  # a sharding
        selection = None
        if model.mesh is not None:
            rows = sharding(model.mesh, "batch")
            everywhere: Any = sharding(model.mesh)
            selection = Selection(mass=rows, order=everywhere, count=everywhere, weights=rows)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        kept = (shardings, shardings.step)  # metrics are replicated, like the step's number
        self.keys = jax.jit(
            partial(row_keys, config.seed, answers=config.rollout.answers_per_prompt), out_shardings=rows
        )
        self.move_answers = jax.jit(lambda answers: answers, out_shardings=rows)
        self.limiting = jax.jit(among_first, out_shardings=selection)
        self.selecting, self.weighing, self.recording, self.accumulators = {}, {}, {}, {}
        self.readings = {}  # of the student
        for name, branch in config.branches.items():
            objective = setup.objectives[name]
            several = config.rollout.answers_per_prompt
            rule = partial(_select, seed=config.seed, rule=branch.selection, answers=several)
            teacher = teachers[name] if objective.teacher_logits else None
            loss = Loss(model, objective, teacher, setup.agreement)
            self.readings[name] = StudentReading(objective, teacher) if objective.second_pass else LOG_PROB
            self.selecting[name] = jax.jit(rule, out_shardings=selection)
            self.weighing[name] = jax.jit(partial(weigh, setup=setup, branch=name), out_shardings=rows)
            if objective.has_constants:
                self.recording[name] = jax.jit(partial(loss_record, objective=objective), out_shardings=rows)
            self.accumulators[name] = GradientAccumulator(loss, shardings.params, config.compute.logits_chunk)
        self.updates = {
            phase: jax.jit(update, donate_argnums=0, out_shardings=kept) for phase, update in _updates(setup).items()
        }

    def params(self, state: TrainState) -> Params:
        """All parameters of the student."""
        return merge(self._params, state.params)

    def needs_student_forward(self, step: int) -> bool:
        """Whether the student scores its answers in a forward pass in this step."""
        return not self.setup.trusts_sampler or step % COMPARE_EVERY == 0

    # ------------------------------------------------------------------------------- a branch's answers

    def next_prompts(self, branch: Branch) -> PromptBatch:
        """The next batch of the branch's prompt stream, on the mesh."""
        with self.stages("other"):
            return global_rows(self.setup.mesh, next(branch.prompts), self.setup.rows[branch.name])

    def generate(
        self,
        branch: Branch,
        state: TrainState,
        prompts: PromptBatch,
        draw: np.int32,
        meanwhile: Callable[[], None] | None = None,
    ) -> Rollout:
        """Answers to a batch of prompts: by the student, by the branch's teacher (`config.method.answers`), by both
        (`config.rollout.sampler`), or given.

        The weights are cast once and moved to the rollout mesh; the answers are moved back to the training mesh.

        Args:
          draw: a number from which the random keys are derived.
          meanwhile: called once, while the devices sample.
        """
        if self.setup.config.compute.offloads:
            self._idle.put((state.moments, state.average))
        teacher_params = branch.teacher.fetch()
        with self.stages("rollout"):
            if prompts.answers is not None:
                if meanwhile is not None:
                    meanwhile()
                return _cut_to_bucket(prompts.answers, self.setup.config.rollout.smallest_bucket)
            model: LanguageModel | Pair = self.model
            tokens: Prompts | PairedPrompts = prompts.student
            params = self.params(state)
            if self.setup.config.rollout.sampler != "student":
                model, tokens = Pair(self.model, branch.teacher.model), PairedPrompts.of(prompts)
                params = (params, teacher_params)
            elif self.setup.config.method.answers == "teacher":
                model, params, tokens = branch.teacher.model, teacher_params, prompts.teacher
            if model.mesh is not None:
                model = model.on(self.setup.rollout_mesh)
            params = generate.for_decoding(model, params)
            keys = self.keys(draw, prompts.index)
            answers = generate.answers(model, params, tokens, keys, self.decode, meanwhile)
            if model.mesh != self.model.mesh:
                answers = self.move_answers(answers)
            return _cut_to_bucket(answers, self.setup.config.rollout.smallest_bucket)

    def score(
        self, branch: Branch, state: TrainState, prompts: PromptBatch, answers: Rollout, forward: bool
    ) -> tuple[LogProbs, TeacherRecord]:
        """The answers' log-probabilities under both models, and the values that the objective stores.

        Args:
          forward: whether the student does a forward pass; False: its log-probabilities are those from sampling, unless
            the objective has a second pass.
        """
        with self.stages("score"):
            teacher, objective = branch.teacher, branch.objective
            params = teacher.fetch()
            sequences = answers.after(prompts.teacher)
            record = self.forward(teacher.model, params, sequences, self.setup.reading(branch.name))
            of_teacher, of_student = record.pop("log_prob"), {"log_prob": answers.log_probs}
            head = head_params(teacher.model, params) if objective.teacher_logits else {}
            if self.setup.config.compute.offloads:
                head = jax.tree.map(jnp.copy, head)
            if forward or objective.second_pass:
                given = TeacherRecord(record, head) if objective.second_pass else NOTHING
                sequences, reading = answers.after(prompts.student), self.readings[branch.name]
                of_student = self.forward(self.model, self.params(state), sequences, reading, given)
            log_probs = LogProbs(of_student.pop("log_prob"), of_teacher)
            record |= of_student
            log_probs, record, head = jax.block_until_ready((log_probs, record, head))
            teacher.release()
            return log_probs, TeacherRecord(record, head)

    def select(
        self, branch: Branch, log_probs: LogProbs, answers: Rollout, draw: np.int32, step: int | None = None
    ) -> Selection:
        """Selects the answers that the update trains on.

        Args:
          step: whose update it is; None: of any step, so that no answer has to wait for another one.
        """
        config = self.setup.config
        with self.stages("select"):
            selection = self.selecting[branch.name](log_probs, answers.lengths, draw)
            if step is not None and config.method.split == "over_steps":
                trained = schedule.trained_rows(config, self.setup.rows, step)
                selection = self.limiting(selection, np.int32(trained[branch.name]))
            return jax.block_until_ready(selection)

    def forward(
        self,
        model: LanguageModel,
        params: Params,
        sequences: Sequences,
        reading: Reading,
        given: TeacherRecord = NOTHING,
    ) -> Record:
        """`reading` of a model's logits at each token of given answers, computed one micro-batch at a time."""
        config = self.setup.config
        parts = micro_batches(model.mesh, sequences, self.setup.score_batch, config.rollout.smallest_bucket)
        return score_batch(model, params, sequences, parts, config.compute.logits_chunk, reading, given)

    # --------------------------------------------------------------------------- gradients and the update

    def gradients(
        self, branches: dict[str, Branch], state: TrainState, batches: dict[str, Batch]
    ) -> tuple[dict[str, Gradient], dict[str, Batch]]:
        """The gradient of each batch, and the batches without the arrays that only the gradient needs."""
        with self.stages("update"):
            if self.setup.config.compute.offload == "ahead":
                self._idle.fetch()
            gradients = {name: self._gradient(name, state, batch) for name, batch in batches.items()}
            if self.setup.config.compute.offload == "late":
                jax.block_until_ready(gradients)
            return gradients, {name: batch.after_gradient() for name, batch in batches.items()}

    def update(
        self, state: TrainState, gradients: dict[str, Gradient], batches: dict[str, Batch]
    ) -> tuple[TrainState, Metrics]:
        """One step of the optimizer with the gradients."""
        with self.stages("update"):
            if self.setup.config.compute.offloads:
                state = self.fetch(state)
            if self.setup.config.method.schedule == schedule.MIXED:
                return jax.block_until_ready(self.updates[schedule.MIXED](state, gradients, batches))
            (name,) = batches
            return jax.block_until_ready(self.updates[name](state, gradients[name], batches[name]))

    def fetch(self, state: TrainState) -> TrainState:
        """The state with all its arrays on the devices, after the last step: a diagnosis may have offloaded some."""
        if self._idle.is_empty:
            return state
        moments, average = self._idle.take()
        return state.replace(moments=moments, average=average)

    def _gradient(self, name: str, state: TrainState, batch: Batch) -> Gradient:
        """The gradient of Eq 9. Only the selected answers are computed, so it takes less time if fewer are selected."""
        order, count = gather((batch.selection.order, batch.selection.count))
        config, sequences = self.setup.config, batch.rollout.after(batch.prompts)
        size, smallest = self.setup.micro_batch, config.rollout.smallest_bucket
        parts = micro_batches(self.model.mesh, sequences, size, smallest, order[:count])
        weights = self.weighing[name](batch, state.step)
        record = batch.teacher.tokens
        if name in self.recording:
            record = self.recording[name](batch, state=state.objectives.get(name, {}))
        inputs = LossInputs(sequences, weights, record, batch.rollout.residuals)
        return self.accumulators[name](self.params(state), state.params, inputs, parts, batch.teacher.head)


def student_programs(setup: Setup, student: Loaded, state: TrainState, branches: dict[str, Branch]) -> Programs:
    """The programs of a run. Also moves the teachers to host memory if the config says so."""
    if setup.config.compute.offloads:
        offload_teachers({branch.teacher for branch in branches.values()}, student.params)
    teachers = {name: branch.teacher.model for name, branch in branches.items()}
    return Programs(setup, student.model, student.params, student.eos_ids, state, teachers)


def _select(
    log_probs: LogProbs, lengths: jax.Array, draw: jax.Array, *, seed: int, rule: Any, answers: int
) -> Selection:
    return select(log_probs, lengths, jax.random.fold_in(jax.random.key(seed), draw), rule, answers)


def weigh(batch: Batch, step: jax.Array, *, setup: Setup, branch: str) -> jax.Array:
    """`token_weights` of a branch's batch, float32[B, T]."""
    config, changes = setup.config, setup.weights[branch]
    keys = row_keys(config.seed, step, batch.index, config.rollout.answers_per_prompt)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, WEIGHT_KEYS + list(config.branches).index(branch))
    scale = config.branches[branch].scale
    return token_weights(batch, config.method, setup.objectives[branch], scale, changes, keys)


def _updates(setup: Setup) -> dict[str, Callable[..., tuple[TrainState, Metrics]]]:
    """The update of each phase, with names for profiles: `recovery_update`, `review_update`, ..."""
    config = setup.config
    if config.method.schedule == schedule.MIXED:
        return {schedule.MIXED: partial(mixed_update, config=config, objectives=setup.objectives)}
    updates: dict[str, Callable[..., tuple[TrainState, Metrics]]] = {}
    for name in config.branches:
        update: Any = partial(branch_update, branch=name, config=config, objective=setup.objectives[name])
        update.__name__ = f"{name}_update"
        updates[name] = update
    return updates


def _cut_to_bucket(answers: Rollout, smallest_bucket: int) -> Rollout:
    """Cuts the padding to the smallest bucket that holds the longest answer; later stages then compute less."""
    width = min(answers.tokens.shape[1], bucket(int(jnp.max(answers.lengths)), smallest_bucket))
    return answers.replace(tokens=answers.tokens[:, :width], log_probs=answers.log_probs[:, :width])
