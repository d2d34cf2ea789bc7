"""The phase loop of CaMOPD (arXiv 2605.27115, Algorithm 1).

The life of one step:

    1. phase     recovery, recovery, recovery, review, ...: only one branch acts             (Eq 5)
    2. prompts   the next batch of that branch's own stream
    3. rollout   the student answers, by sampling from itself
    4. score     student and the branch's one teacher: log-probabilities of those answers
    5. select    the smallest set of answers that holds 80 % of the gap mass                 (Eq 6-8)
    6. update    the branch's own compiled update pulls the student toward that teacher      (Eq 9)

Recovery: general prompts, the original model teaches. Review: domain prompts, the specialised model's
frozen copy teaches. The two never share a gradient, save under `config.method.schedule = "mixed"`, the control:
there both branches go through 2 to 5, and one update takes both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camopd_jax.config.schema import Method, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.gradient import Learning
from camopd_jax.method.select import select
from camopd_jax.method.update import Gradient, branch_weights, mixed_update, recovery_update, review_update
from camopd_jax.rollout import generate, scoring
from camopd_jax.rollout.buckets import bucket
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.sampling import Sampling, row_keys
from camopd_jax.runtime.mesh import check_rows, gather, global_rows, reshape_mesh, sharding
from camopd_jax.runtime.offload import on_devices, on_host
from camopd_jax.runtime.timing import Stages
from camopd_jax.types import LanguageModel, Params, PromptBatch, Prompts, Rollout, Scored, Scores, Selection, TrainState

BRANCHES = ("recovery", "review")
ACTING = {"recovery": ("recovery",), "review": ("review",), "mixed": BRANCHES}
UPDATES = {"recovery": recovery_update, "review": review_update, "mixed": mixed_update}
BATCH_SHARE = "a stream's share of config.rollout.batch_size under config.method"
CHECK_EVERY = 16  # steps, where the sampler's log-probabilities are taken for the student's
LARGEST_SAMPLER_GAP = 1e-3  # nats per token between the two, beyond which they may not be


def phase_at(step: int, method: Method) -> str:
    """Eq 5: `recovery_steps` times recovery, then `review_steps` times review, and so on. Or always "mixed"."""
    if method.schedule == "mixed":
        return "mixed"
    within = step % (method.recovery_steps + method.review_steps)
    return "recovery" if within < method.recovery_steps else "review"


def batch_rows(config: TrainConfig) -> dict[str, int]:
    """Prompts of each branch in a step in which it acts."""
    rows, method = config.rollout.batch_size, config.method
    if method.schedule == "alternate":
        return dict.fromkeys(BRANCHES, rows)
    recovery = rows * method.recovery_steps // (method.recovery_steps + method.review_steps)
    return {"recovery": recovery, "review": rows - recovery}


def check_batches(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless every batch of the run divides over the mesh."""
    answering_mesh = rollout_mesh(config, mesh)
    for n in batch_rows(config).values():
        name = "config.rollout.batch_size" if n == config.rollout.batch_size else BATCH_SHARE
        check_rows(mesh, name, n)
        check_rows(answering_mesh, name, n, "config.rollout.mesh")
    if config.rollout.places:
        check_rows(answering_mesh, "config.rollout.places", config.rollout.places, "config.rollout.mesh")
    check_rows(mesh, "config.optimizer.micro_batch", config.optimizer.micro_batch)
    if config.rollout.score_batch:
        check_rows(mesh, "config.rollout.score_batch", config.rollout.score_batch)
    check_rows(mesh, "config.evaluation.batch_size", config.evaluation.batch_size)
    if config.diagnostics.every:
        check_rows(mesh, "config.diagnostics.rows", config.diagnostics.rows)


def score_batch(config: TrainConfig) -> int:
    """Answers in one forward pass that scores them."""
    return config.rollout.score_batch or config.optimizer.micro_batch


def rollout_mesh(config: TrainConfig, mesh: Mesh) -> Mesh:
    """The devices while they answer."""
    wanted = config.rollout.mesh
    return reshape_mesh(mesh, wanted.data, wanted.fsdp, wanted.tensor or mesh.shape["tensor"], "config.rollout.mesh")


@dataclass(frozen=True)
class Branch:
    """What a branch has for itself: its prompts and its teacher."""

    prompts: Any  # data.pipeline.PromptStream: iterator of host PromptBatches, with get_state()
    teacher: LanguageModel
    teacher_params: Params


@dataclass(frozen=True)
class Programs:
    """The compiled functions of a step. Each compiles once per shape bucket, over a whole run."""

    student: LanguageModel
    rollout_mesh: Mesh | None
    decode: Decode
    trusts_sampler: bool  # its log-probabilities are the student's, and spare a forward pass
    keys: Callable[..., jax.Array]
    place: Callable[[Rollout], Rollout]  # from the mesh of the answers onto that of the student
    select: dict[str, Callable[[Scores, jax.Array, jax.Array], Selection]]
    weigh: dict[str, Callable[[Scored], jax.Array]]
    learning: Learning
    update: dict[str, Callable[..., tuple[TrainState, dict[str, jax.Array]]]]


def compile_programs(
    config: TrainConfig, model: LanguageModel, eos_ids: tuple[int, ...], state: TrainState
) -> Programs:
    """Jits the steps for this run; the state keeps its sharding and is donated to each update.

    Of the state only the sharding is read: shapes that carry one are enough.

    Raises:
      UserError: as of `check_remat`.
    """
    rollout = config.rollout
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p)

    def choose(branch: str, scores: Scores, lengths: jax.Array, draw: jax.Array) -> Selection:
        key = jax.random.fold_in(jax.random.key(config.seed), draw)
        return select(scores, lengths, key, getattr(config.method, branch))

    check_remat(config, model.dtype)
    residuals = config.compute.remat == "rollout"
    places = jax.tree.map(lambda x: x.sharding, state)
    kept_in_place = (places, places.step)  # metrics, as the step's number, are whole on every device
    phases = ("mixed",) if config.method.schedule == "mixed" else BRANCHES
    rows = everywhere = selection = None
    if model.mesh is not None:
        rows, everywhere = sharding(model.mesh, "batch"), sharding(model.mesh)
        selection = Selection(score=rows, order=everywhere, count=everywhere, weights=rows)
    return Programs(
        student=model,
        rollout_mesh=None if model.mesh is None else rollout_mesh(config, model.mesh),
        decode=Decode(sampling, eos_ids, rollout.max_response_tokens, rollout.places, rollout.shrinks, residuals),
        trusts_sampler=trusts_sampler(config, model.dtype),
        keys=jax.jit(partial(row_keys, config.seed), out_shardings=rows),
        place=jax.jit(lambda answers: answers, out_shardings=rows),
        select={name: jax.jit(partial(choose, name), out_shardings=selection) for name in BRANCHES},
        weigh={name: jax.jit(partial(branch_weights, name, config=config), out_shardings=rows) for name in BRANCHES},
        learning=Learning(model, places.params, config.compute.logits_chunk),
        update={
            phase: jax.jit(partial(UPDATES[phase], config=config), donate_argnums=0, out_shardings=kept_in_place)
            for phase in phases
        },
    )


def trusts_sampler(config: TrainConfig, dtype: str) -> bool:
    """Whether the sampler's log-probabilities, of products in this precision, spare the student a forward pass."""
    exact = jnp.dtype(dtype) == jnp.float32
    trusts = {"auto": exact, "forward": False, "sampler": True}[config.rollout.student_logprobs]
    return trusts and config.method.answers == "student"


def check_remat(config: TrainConfig, dtype: str) -> None:
    """Raises UserError for a gradient that begins with the rollout, where the sampler is not trusted."""
    if config.compute.remat == "rollout" and not trusts_sampler(config, dtype):
        raise UserError(
            "config.compute.remat is 'rollout', which trusts the sampler, and in "
            f"{dtype} config.rollout.student_logprobs does not; set that to sampler, or remat to block"
        )


@dataclass(frozen=True)
class Outcome:
    """What a finished step leaves for the host. Arrays are global and still on the devices."""

    step: int
    phase: str
    parts: dict[str, Scored]  # of each acting branch
    metrics: dict[str, Any]  # scalars, and the table of answers; in a mixed step, a branch's own under its name
    seconds: dict[str, float]


class Observer(Protocol):
    """What the host does beside the steps."""

    def log(self, outcome: Outcome) -> None:
        """Light work: metrics and samples. Called for step n-1 while the devices roll out step n."""

    def pauses_after(self, steps_done: int) -> bool:
        """Whether `pause` is called between this step and the next."""

    def pause(self, steps_done: int, state: TrainState) -> bool:
        """Checkpoints and evaluations, after `log` of every step so far. True ends the run here."""


def run(
    config: TrainConfig, branches: dict[str, Branch], programs: Programs, state: TrainState, observer: Observer
) -> TrainState:
    """Runs the steps from `state.step` to `config.steps`, or until the observer ends the run."""
    rows = batch_rows(config)
    waiting: Outcome | None = None
    offload = config.compute.offload
    if offload != "off":
        branches = {name: replace(b, teacher_params=on_host(b.teacher_params)) for name, b in branches.items()}
    for step in range(int(state.step), config.steps):
        phase = phase_at(step, config.method)
        two_ways = not programs.trusts_sampler or step % CHECK_EVERY == 0
        stages = Stages()
        parts: dict[str, Scored] = {}
        if offload != "off":
            state = state.replace(moments=on_host(state.moments))

        def log_the_last(stages: Stages = stages) -> None:
            nonlocal waiting
            if waiting is not None:
                with stages("other"):
                    observer.log(waiting)
                waiting = None

        for i, name in enumerate(ACTING[phase]):
            branch, draw = branches[name], np.int32(step * len(ACTING[phase]) + i)
            with stages("other"):
                prompts = global_rows(programs.student.mesh, next(branch.prompts), rows[name])
            if offload != "off":
                branch = replace(branch, teacher_params=on_devices(branch.teacher_params))
            with stages("rollout"):
                answers = ask(config, programs, branch, state.params, prompts, draw, log_the_last)
                answers = cut_to_bucket(answers, config.rollout.smallest_bucket)
            with stages("score"):
                scores = score_both(config, programs, branch, state.params, prompts, answers, two_ways)
                jax.block_until_ready(scores)
            with stages("select"):
                selection = jax.block_until_ready(programs.select[name](scores, answers.lengths, draw))
            parts[name] = Scored(prompts.student, prompts.index, answers, scores, selection)
            del branch
        if offload == "ahead":
            state = state.replace(moments=on_devices(state.moments))
        with stages("update"):
            gradients = [gradient(config, programs, name, state.params, part) for name, part in parts.items()]
            parts = {name: without_residuals(part) for name, part in parts.items()}
            if offload == "late":
                jax.block_until_ready(gradients)
                state = state.replace(moments=on_devices(state.moments))
            state, metrics = jax.block_until_ready(programs.update[phase](state, *gradients, *parts.values()))
            del gradients

        for name in parts:
            compares = two_ways and config.method.answers == "student"
            compare(metrics[name] if len(parts) > 1 else metrics, compares, programs.trusts_sampler, step)
        waiting = Outcome(step, phase, parts, metrics, stages.seconds())
        if observer.pauses_after(step + 1):
            observer.log(waiting)
            waiting = None
            if observer.pause(step + 1, state):
                break
    return state


def ask(
    config: TrainConfig,
    programs: Programs,
    branch: Branch,
    params: Params,
    prompts: PromptBatch,
    draw: np.int32,
    meanwhile: Callable[[], None] | None = None,
) -> Rollout:
    """The student's answers to a batch of a branch's prompts; under a control, the branch's teacher's.

    The weights go, cast once, to where the devices answer from; the answers come back to where they learn.
    """
    model, asked = programs.student, prompts.student
    if config.method.answers == "teacher":
        model, params, asked = branch.teacher, branch.teacher_params, prompts.teacher
    model = model.on(programs.rollout_mesh)
    params = generate.for_decoding(model, params)
    keys = programs.keys(draw, prompts.index)
    said = generate.answers(model, params, asked, keys, programs.decode, meanwhile)
    return said if programs.rollout_mesh == programs.student.mesh else programs.place(said)


def score_both(
    config: TrainConfig,
    programs: Programs,
    branch: Branch,
    params: Params,
    prompts: PromptBatch,
    answers: Rollout,
    forward: bool,
) -> Scores:
    """Log-probabilities of the answers under the student and the branch's teacher.

    The student's were known when it sampled: where they are trusted, only `forward` asks for a pass of their own.
    """
    teacher = score(config, branch.teacher, branch.teacher_params, prompts.teacher, answers)
    if not forward:
        return Scores(answers.log_probs, teacher)
    return Scores(score(config, programs.student, params, prompts.student, answers), teacher)


def score(config: TrainConfig, model: LanguageModel, params: Params, prompts: Prompts, answers: Rollout) -> jax.Array:
    """Log-probabilities of the answers under one model, float32[B, T]."""
    everyone = scoring.micro_batches(
        model.mesh, prompts, answers.tokens, answers.lengths, score_batch(config), config.rollout.smallest_bucket
    )
    chunk = config.compute.logits_chunk
    return scoring.score(model, params, prompts, answers.tokens, answers.lengths, everyone, chunk=chunk)


def gradient(config: TrainConfig, programs: Programs, name: str, params: Params, part: Scored) -> Gradient:
    """Of Eq 9, over the selected answers of a branch: its cost follows what was selected."""
    order, count = gather((part.selection.order, part.selection.count))
    said, smallest = part.rollout, config.rollout.smallest_bucket
    selected = scoring.micro_batches(
        programs.student.mesh, part.prompts, said.tokens, said.lengths, config.optimizer.micro_batch, smallest,
        order[:count],
    )  # fmt: skip
    weights = programs.weigh[name](part)
    return programs.learning(params, part.prompts, said.tokens, said.lengths, weights, selected, said.residuals)


def without_residuals(part: Scored) -> Scored:
    """What is left of a part when its gradient is there."""
    return part.replace(rollout=part.rollout.replace(residuals=()))


def compare(metrics: dict[str, jax.Array], forward: bool, trusts_sampler: bool, step: int) -> None:
    """Drops a sampler gap that compares nothing.

    Raises:
      UserError: if the sampler is trusted, and off.
    """
    if not forward:
        del metrics["sampler_gap"]
    elif trusts_sampler and metrics["sampler_gap"] > LARGEST_SAMPLER_GAP:
        raise UserError(
            f"config.rollout.student_logprobs: at step {step} the sampler's log-probabilities are "
            f'{metrics["sampler_gap"]:.4f} nats a token off a forward pass; set it to "forward"'
        )


def cut_to_bucket(answers: Rollout, smallest_bucket: int) -> Rollout:
    """Drops padding slots beyond the longest answer, to a bucket's width: what follows costs less."""
    cap = answers.tokens.shape[1]
    width = min(cap, bucket(int(jnp.max(answers.lengths)), smallest_bucket))
    return answers.replace(tokens=answers.tokens[:, :width], log_probs=answers.log_probs[:, :width])
