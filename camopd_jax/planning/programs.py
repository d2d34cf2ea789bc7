"""A run's own programs, from shapes alone: no weights are read and no array is made.

They are those of `phases.compile_programs`; only their arguments are `jax.ShapeDtypeStruct`s that carry the
shardings which the run's arrays will have, on devices that need not be there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax import engine, phases
from camopd_jax.buckets import bucket
from camopd_jax.config import TrainConfig
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import leaf_of, shardings, table, tree_of
from camopd_jax.optim import abstract_state
from camopd_jax.phases import BRANCHES, Programs
from camopd_jax.sharding import make_mesh, sharding
from camopd_jax.types import LanguageModel, Params, Prompts, Rollout, Scored, Scores, Selection, TrainState


@dataclass(frozen=True)
class Models:
    """The run's two checkpoints, of which only config.json is known."""

    general: ModelConfig
    specialised: ModelConfig
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """One compiled function of the run, at its largest shapes."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    arguments: dict[str, Any]  # by kind: {"parameters": ..., "optimizer": ..., "teacher": ..., "batch": ...}
    same_as: str | None = None  # an earlier program of the very same shapes: compiled once


@dataclass(frozen=True)
class Plan:
    """What is compiled, and what else lies on the devices meanwhile."""

    config: TrainConfig
    mesh: Mesh
    student: LanguageModel
    state: TrainState  # all of it abstract, as the next two
    teachers: dict[str, tuple[LanguageModel, Params]]  # "general", "specialised"
    batch: Scored  # of the branch with the most rows
    prompt_slots: int
    rows: int

    @property
    def shards(self) -> int:
        """Pieces of a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def plan(config: TrainConfig, models: Models, devices: Any, platform: str) -> Plan:
    """The run's arrays on these devices, at its largest shape bucket.

    Raises:
      UserError: for a mesh or batches that do not fit the devices or the models.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices)
    phases.check_batches(config, mesh)
    vocab = min(models.general.vocab_size, models.specialised.vocab_size)
    dtype = engine.matmul_dtype(config.compute, platform)

    def model(shape: ModelConfig) -> Model:
        shape = dataclasses.replace(shape, output_vocab_size=vocab)
        return Model(shape, mesh=mesh, dtype=dtype, remat=config.compute.remat, attention=config.compute.attention)

    general, student = model(models.general), model(models.specialised)
    of_teacher = engine.teacher_dtype(config.compute, platform)
    teachers = {
        "general": (general, abstract_params(general.config, mesh, of_teacher)),
        "specialised": (student, abstract_params(student.config, mesh, of_teacher)),
    }
    rows = max(phases.batch_rows(config).values())
    rollout = config.rollout
    slots = min(rollout.max_prompt_tokens, bucket(rollout.max_prompt_tokens, rollout.smallest_bucket))
    return Plan(
        config=config,
        mesh=mesh,
        student=student,
        state=abstract_state(abstract_params(student.config, mesh, config.compute.params), config.method.moments),
        teachers=teachers,
        batch=abstract_batch(mesh, rows, slots, rollout.max_response_tokens),
        prompt_slots=slots,
        rows=rows,
    )


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The parameters as they will lie on the mesh."""
    places = shardings(config, mesh)
    return tree_of({
        row.path: jax.ShapeDtypeStruct(row.shape(config.num_layers), dtype, sharding=leaf_of(places, row.path))
        for row in table(config)
    })  # fmt: skip


def abstract_batch(mesh: Mesh, rows: int, prompt_slots: int, answer_slots: int) -> Scored:
    """Scored answers, split over the batch axes; a selection's order and count are whole everywhere."""

    def of_rows(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding(mesh, "batch"))

    lengths = of_rows(dtype=jnp.int32)
    return Scored(
        prompts=Prompts(of_rows(prompt_slots, dtype=jnp.int32), lengths),
        index=lengths,
        rollout=Rollout(
            of_rows(answer_slots, dtype=jnp.int32), lengths, of_rows(answer_slots), of_rows(), of_rows(dtype=jnp.bool_)
        ),
        scores=Scores(of_rows(answer_slots), of_rows(answer_slots)),
        selection=Selection(
            score=of_rows(),
            order=jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding(mesh)),
            count=jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding(mesh)),
            weights=of_rows(),
        ),
    )


def programs(p: Plan, eos_ids: tuple[int, ...]) -> Iterator[Program]:
    """The programs of a step, in its order. Those of the same shapes are named, and compiled once."""
    compiled = phases.compile_programs(p.config, p.student, eos_ids, p.state)
    return _unique(_all(p, compiled))


def _all(p: Plan, compiled: Programs) -> Iterator[Program]:
    batch, said = p.batch, p.batch.rollout
    draw = jax.ShapeDtypeStruct((), jnp.int32)
    acting = {"student": (p.student, p.state.params)}
    if p.config.method.answers == "teacher":
        acting = {f"{name} teacher": teacher for name, teacher in p.teachers.items()}
    for name, (model, params) in acting.items():
        yield _program(f"rollout: {name}", compiled.rollout, (model, params, batch.prompts, batch.index, draw),
                       {"parameters": params, "batch": (batch.prompts, batch.index)})  # fmt: skip
    scoring = {"student": (p.student, p.state.params)}
    scoring |= {f"{name} teacher": teacher for name, teacher in p.teachers.items() if _teaches(p.config, name)}
    asked = batch.prompts, said.tokens, said.lengths
    for name, (model, params) in scoring.items():
        yield _program(f"score: {name}", compiled.score, (model, params, *asked),
                       {"parameters" if name == "student" else "teacher": params, "batch": asked})  # fmt: skip
    for name in BRANCHES:
        asked = batch.scores, said.lengths, draw
        yield _program(f"select: {name}", compiled.select[name], asked, {"batch": asked[:2]})
    for name, update in compiled.update.items():
        parts = _parts(p, name)
        yield _program(f"update: {name}", update, (p.state, *parts), {
            "parameters": p.state.params, "optimizer": (p.state.moments, p.state.step, p.state.skipped), "batch": parts,
        })  # fmt: skip


def _teaches(config: TrainConfig, name: str) -> bool:
    return name == "general" or config.method.domain_teacher == "specialised"


def _parts(p: Plan, update: str) -> tuple[Scored, ...]:
    if update != "mixed":
        return (p.batch,)
    answers = p.batch.rollout.tokens.shape[1]
    return tuple(abstract_batch(p.mesh, n, p.prompt_slots, answers) for n in phases.batch_rows(p.config).values())


def _program(name: str, jitted: Any, args: tuple, arguments: dict[str, Any]) -> tuple[Program, tuple]:
    key = (id(jitted), *jax.tree.leaves(args))
    return Program(name, lambda: jitted.lower(*args), arguments), key


def _unique(named: Iterator[tuple[Program, tuple]]) -> Iterator[Program]:
    seen: dict[str, str] = {}
    for program, key in named:
        first = seen.setdefault(repr(key), program.name)
        yield program if first == program.name else dataclasses.replace(program, same_as=first)


def chip_bytes(tree: Any) -> int:
    """Bytes that arrays of these shapes and shardings have on one device."""

    def size(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))
