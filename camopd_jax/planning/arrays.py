"""A run's arrays as shapes: `jax.ShapeDtypeStruct`s with the run's own shardings, on devices that may be absent."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from camopd_jax.config.schema import TrainConfig
from camopd_jax.method.branches import teacher_names
from camopd_jax.method.optimizer import abstract_state, moment_names
from camopd_jax.method.programs import Programs
from camopd_jax.method.setup import Setup, check_model, resolve
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.partition import trained
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runtime.mesh import sharding
from camopd_jax.types import Params, TrainState


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run, of which only config.json is known."""

    shapes: dict[str, ModelConfig]  # "general", "specialised" and further teachers, as branches name them
    eos_ids: tuple[int, ...] = ()

    @property
    def student(self) -> ModelConfig:
        return self.shapes["specialised"]


@dataclass(frozen=True)
class Plan:
    """A run's set-up and programs, its models and their parameters as shapes."""

    setup: Setup
    student: Model
    params: Params  # all of the student
    state: TrainState
    teachers: dict[str, tuple[Model, Params]]  # all models that a run loads beside the student
    run: Programs

    def teacher(self, branch: str) -> tuple[Model, Params]:
        return self.teachers[self.setup.config.branches[branch].teacher]


def plan(config: TrainConfig, models: Models, devices: Any) -> Plan:
    """The run on these devices.

    Raises:
      UserError: for a mesh or batches that do not fit the devices or the models.
    """
    setup = resolve(config, devices)
    compute, vocab = config.compute, min(shape.vocab_size for shape in models.shapes.values())

    def model(shape: ModelConfig) -> Model:
        check_model(shape, setup.mesh, compute, setup.dtype)
        shape = dataclasses.replace(shape, output_vocab_size=vocab)
        return Model(shape, mesh=setup.mesh, dtype=setup.dtype, remat=compute.remat, attention=compute.attention)

    made = {name: model(models.shapes[name]) for name in teacher_names(config)}
    student = made["specialised"]
    params = abstract_params(student, setup.mesh, compute.params)
    averages = config.optimizer.average is not None
    state = abstract_state(trained(params, config.optimizer.trained), moment_names(config), averages)
    teachers = {name: (of, abstract_params(of, setup.mesh, setup.teacher_dtype)) for name, of in made.items()}
    of_branches: Any = {name: made[branch.teacher] for name, branch in config.branches.items()}
    run = Programs(setup, student, params, models.eos_ids, state, of_branches)
    return Plan(setup, student, params, state, teachers, run)


def abstract_params(model: Model, mesh: Mesh, dtype: str) -> Params:
    """A model's parameters with their shardings on a mesh."""
    shapes = jax.eval_shape(model.on(None).init, jax.random.key(0))
    places = shardings(model.config, mesh)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, dtype, sharding=place), shapes, places)


def rows(mesh: Mesh, shapes: Any) -> Any:
    """Shapes of arrays [B, ...], their rows split over the mesh's batch axes."""
    place = sharding(mesh, "batch")
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)


def chip_bytes(tree: Any) -> int:
    """Bytes on one device of the `jax.ShapeDtypeStruct`s in a tree."""

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct))
