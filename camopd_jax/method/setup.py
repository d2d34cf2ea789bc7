"""Derives the settings of a run from config, mesh and platform, and checks a config against mesh, model and platform.

`train`, `doctor` and `plan` use the same functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.config.schema import AUTO, Compute, Evaluation, Optimizer, SftConfig, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.inference.interpolation import check_architectures
from camopd_jax.method import schedule
from camopd_jax.method.agreement import Agreement
from camopd_jax.method.objectives import Objective, TeacherReading, objective
from camopd_jax.method.token_weights import TokenWeight, branch_weights
from camopd_jax.models import cached, fused
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.peft_settings import is_adapter
from camopd_jax.models.weights import shardings
from camopd_jax.runtime import trackers
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.mesh import batch_shards, check_rows, expert_shards, mesh_of, platform, reshape_mesh

UNCHOSEN = "for which only train, analyze, prompts, plan and doctor choose a value (planning.automatic)"


@dataclass(frozen=True)
class Setup:
    """A run's config, and everything that is derived from it and the devices."""

    config: TrainConfig
    mesh: Mesh  # for everything except sampling
    rollout_mesh: Mesh  # the same devices, for sampling
    dtype: str  # of activations and matrix products
    teacher_dtype: str  # of the teachers' weights
    rows: dict[str, int]  # answers of each branch in a step that trains it
    objectives: dict[str, Objective]  # of each branch
    weights: dict[str, tuple[TokenWeight, ...]]  # of each branch
    trusts_sampler: bool  # whether log-probabilities from sampling replace the student's forward pass

    @property
    def micro_batch(self) -> int:
        """Answers in one forward and backward pass."""
        return rows_at_once(self.config.optimizer)

    @property
    def score_batch(self) -> int:
        """Answers scored in one forward pass."""
        return self.config.rollout.score_batch or self.micro_batch

    @property
    def agreement(self) -> Agreement | None:
        """The monitors of agreement, if the config has them."""
        return Agreement(self.config.log.agreement) if self.config.log.agreement else None

    @property
    def records_student(self) -> bool:
        """Whether log-probabilities from sampling are the student's."""
        return _records_student(self.config)

    def reading(self, branch: str) -> TeacherReading:
        """The teacher's values that a branch needs."""
        monitors = () if self.agreement is None else (self.agreement,)
        return TeacherReading(self.objectives[branch], self.weights[branch] + monitors)

    @property
    def keep_residuals(self) -> bool:
        """Whether a rollout keeps the residual stream for the gradient."""
        return self.config.compute.remat == "rollout"

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def prompt_slots(self) -> int:
        """Padded length of the longest prompt."""
        rollout = self.config.rollout
        return min(rollout.max_prompt_tokens, bucket(rollout.max_prompt_tokens, rollout.smallest_bucket))


def resolve(config: TrainConfig, devices: Any = None) -> Setup:
    """The setup of a run on these devices; None: all devices of JAX.

    Raises:
      UserError: naming the field, for a mesh that does not match the number of devices, for batches that the mesh does
        not divide, and for fields that exclude each other on this platform.
    """
    mesh = mesh_of(config.mesh, devices)
    wanted = config.rollout.mesh
    tensor, expert = wanted.tensor or mesh.shape["tensor"], wanted.expert or expert_shards(mesh)
    dtype = loading.matmul_dtype(config.compute, platform(mesh))
    objectives = {name: _objective(config, name) for name in config.branches}
    rollout_mesh = reshape_mesh(mesh, wanted.data, wanted.fsdp, tensor, "config.rollout.mesh", expert)
    setup = Setup(
        config=config,
        mesh=mesh,
        rollout_mesh=rollout_mesh,
        dtype=dtype,
        teacher_dtype=loading.teacher_dtype(config.compute, platform(mesh)),
        rows=schedule.batch_rows(config, math.lcm(batch_shards(mesh), batch_shards(rollout_mesh))),
        objectives=objectives,
        weights={name: branch_weights(config, name, of) for name, of in objectives.items()},
        trusts_sampler=_trusts_sampler(config, dtype),
    )
    _check_batches(setup)
    check_remat(config, dtype)
    trackers.check(config.log.trackers)
    return setup


def check_model(config: ModelConfig, mesh: Mesh, compute: Compute, dtype: str) -> None:
    """Raises UserError unless the mesh divides the model's dimensions and the platform supports its attention."""
    shardings(config, mesh)
    if compute.attention == "fused":
        fused.check(config, mesh, dtype)
    if compute.decode_attention == "fused":
        cached.check(config, mesh, dtype)


def check_start(config: TrainConfig, shapes: Mapping[str, ModelConfig], student: Path) -> None:
    """Raises UserError if the student starts between two models whose architectures differ, or has an adapter.

    Args:
      shapes: of the models, by their names in branches.
      student: folder of the specialised model.
    """
    if config.start.interpolation != 0:
        if config.adapter is not None or is_adapter(student):
            raise UserError(
                f"config.start.interpolation is {config.start.interpolation!r}, but the student is trained by an "
                "adapter, beside which the base weights are frozen; give 0"
            )
        check_architectures(shapes["general"], shapes["specialised"], config.general_model)


def check_evaluation(evaluation: Evaluation, mesh: Mesh) -> None:
    """Raises UserError unless the mesh divides the batches of an evaluation."""
    check_rows(mesh, "config.evaluation.batch_size", evaluation.batch_size)


def check_diagnostics(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless the mesh divides the answers of a diagnosis."""
    check_rows(mesh, "config.diagnostics.rows", config.diagnostics.rows)


def resolve_fine_tuning(config: SftConfig) -> Mesh:
    """The mesh of a run of supervised fine-tuning.

    Raises:
      UserError: as `resolve`.
    """
    mesh = mesh_of(config.mesh)
    check_rows(mesh, "config.batch_size", config.batch_size)
    check_rows(mesh, "config.optimizer.micro_batch", rows_at_once(config.optimizer))
    check_evaluation(config.evaluation, mesh)
    trackers.check(config.log.trackers)
    return mesh


def rows_at_once(optimizer: Optimizer) -> int:
    """`micro_batch`, where "auto" has been replaced by a number.

    Raises:
      UserError: if it has not.
    """
    if optimizer.micro_batch == AUTO:
        raise UserError(f"config.optimizer.micro_batch is {AUTO!r}, {UNCHOSEN}; give a number, such as 8")
    return optimizer.micro_batch


def check_remat(config: TrainConfig, dtype: str) -> None:
    """Raises UserError for remat "auto"; for "rollout", if the student's log-probabilities are not the sampler's."""
    if config.compute.remat == AUTO:
        raise UserError(f"config.compute.remat is {AUTO!r}, {UNCHOSEN}; give a name, such as block")
    if config.compute.remat == "rollout" and not _trusts_sampler(config, dtype):
        raise UserError(
            "config.compute.remat is 'rollout', which needs the sampler's log-probabilities, but in "
            f"{dtype} config.rollout.student_logprobs is {config.rollout.student_logprobs!r}, which does not use them; "
            "set that to sampler, or remat to block"
        )


def _trusts_sampler(config: TrainConfig, dtype: str) -> bool:
    exact = jnp.dtype(dtype) == jnp.float32
    trusts = {"auto": exact, "forward": False, "sampler": True}[config.rollout.student_logprobs]
    return trusts and _records_student(config) and config.rollout.sampler == "student"


def _records_student(config: TrainConfig) -> bool:
    return config.method.answers == "student" and config.rollout.sampler != "mixed"


def _objective(config: TrainConfig, branch: str) -> Objective:
    field, text = f"config.branches.{branch}.objective", config.branches[branch].objective
    chosen = objective(text, field)
    if config.method.answers == "teacher" and not chosen.off_policy:
        raise UserError(
            f"{field} is {text!r}, which is only valid for answers of the student, but config.method.answers is "
            "'teacher'; give cross_entropy"
        )
    _check_importance(config, field, chosen)
    return chosen


def _check_importance(config: TrainConfig, field: str, chosen: Objective) -> None:
    """Raises UserError unless an objective is valid for the sampler, with the importance weights that it needs."""
    text, gate = config.branches[field.split(".")[2]].objective, config.method.importance_gate
    if chosen.weighs_importance and gate is not None:
        raise UserError(
            f"config.method.importance_gate is {gate}, but {field} = {text!r} weighs tokens itself; give None"
        )
    if chosen.off_policy or config.rollout.sampler == "student":
        return
    if config.rollout.sampler == "speculative":
        raise UserError(
            f"{field} is {text!r}, which is only valid for answers of the student, but config.rollout.sampler is "
            "'speculative'; give forward_kl or another divergence"
        )
    if not chosen.weighs_importance and gate is None:
        raise UserError(
            f"{field} is {text!r}, which needs importance weights for config.rollout.sampler 'mixed'; give "
            "config.method.importance_gate, such as (0.0, 2.0)"
        )


def _per_answer(field: str, several: int) -> str:
    """The field's name in an error about its number of prompts."""
    return field if several == 1 else f"{field} / config.rollout.answers_per_prompt"


def _check_batches(setup: Setup) -> None:
    """Raises UserError unless every batch of the run divides over the mesh."""
    config, mesh = setup.config, setup.mesh
    rollout = config.rollout
    several = rollout.answers_per_prompt
    for n in (rows // several for rows in setup.rows.values()):
        field = "config.rollout.batch_size"
        if n != rollout.batch_size:
            field = f"a branch's share of {field}"
        check_rows(mesh, field, n)
        check_rows(setup.rollout_mesh, field, n, "config.rollout.mesh")
    if rollout.concurrency:
        started = rollout.concurrency // several  # prompts
        check_rows(
            setup.rollout_mesh, _per_answer("config.rollout.concurrency", several), started, "config.rollout.mesh"
        )
    check_rows(mesh, "config.optimizer.micro_batch", setup.micro_batch)
    if rollout.score_batch:
        check_rows(mesh, "config.rollout.score_batch", rollout.score_batch)
    check_evaluation(config.evaluation, mesh)
    if config.diagnostics.every:
        check_diagnostics(config, mesh)
