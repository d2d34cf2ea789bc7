"""A run's arrays as shapes: `jax.ShapeDtypeStruct`s with the run's own shardings, on devices that may be absent."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from camopd_jax.config.schema import TrainConfig
from camopd_jax.inference import loading
from camopd_jax.method.branches import teacher_names
from camopd_jax.method.optimizer import abstract_run_state
from camopd_jax.method.programs import Programs
from camopd_jax.method.setup import Setup, check_model, resolve
from camopd_jax.models import adapters
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.partition import trained
from camopd_jax.models.peft_settings import CONFIG, base_folder, is_adapter, new_settings, read_settings
from camopd_jax.models.quantised import INT8, stored_leaves
from camopd_jax.models.rows import WeightRow
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import leaf_dtype, leaf_of, shardings, table, tree_of
from camopd_jax.runtime.mesh import sharding
from camopd_jax.types import Params, TrainState

FILES = ("config.json", CONFIG)  # all that is read of a checkpoint


@dataclass(frozen=True)
class ModelShapes:
    """The checkpoints of a run, of which only config.json is known."""

    shapes: dict[str, ModelConfig]  # "general", "specialised" and further teachers, as branches name them
    eos_ids: tuple[int, ...] = ()
    bases: dict[str, str] = field(default_factory=dict)  # of each adapter, the other model whose arrays it shares
    replaced: dict[str, tuple[WeightRow, ...]] = field(
        default_factory=dict
    )  # by each adapter: arrays it does not share
    trained: ModelConfig | None = None  # the student, if it is not as the specialised model is
    shared_vocab: int | None = None  # tokens that all tokenizers share; None: not known, or all

    @property
    def student(self) -> ModelConfig:
        return self.trained or self.shapes["specialised"]

    @property
    def base_of_student(self) -> str | None:
        """The model whose arrays an adapter of the student leaves frozen."""
        return self.bases.get("specialised", "specialised") if self.student.adapter else None

    @property
    def on_one_base(self) -> frozenset[str]:
        """The models that share their frozen weights with a student that is trained by an adapter."""
        base = self.base_of_student
        return frozenset() if base is None else frozenset({base, *(a for a, b in self.bases.items() if b == base)})


def make_models(
    config: TrainConfig, shapes: dict[str, ModelConfig], folders: dict[str, Path], eos_ids: tuple[int, ...] = ()
) -> ModelShapes:
    """The models of a config.

    Args:
      shapes: of each model. folders: of those that have one.
    """
    student, int8 = shapes["specialised"], config.compute.teacher == INT8
    if config.adapter is not None:
        student = new_settings(config.adapter, student, "").model_config(student)
    frozen = {name: dataclasses.replace(shape, int8=int8) for name, shape in shapes.items()}
    student = dataclasses.replace(student, int8=int8 and bool(student.adapter))
    replaced = {name: replaced_rows(folder, int8) for name, folder in folders.items() if is_adapter(folder)}
    return ModelShapes(frozen, eos_ids, shared_bases(folders), replaced, student)


def read_folders(config: TrainConfig, folders: dict[str, Path], context: int) -> ModelShapes:
    """The models of a config, from their folders."""
    shapes = {name: loading.model_config(folder, context, FILES) for name, folder in folders.items()}
    return make_models(config, shapes, folders)


def shared_bases(folders: dict[str, Path]) -> dict[str, str]:
    """The adapters among the models whose base model is another one of them: {adapter: base}.

    A run also shares equal weights in different folders, which are not compared here.
    """
    names = {folder.resolve(): name for name, folder in folders.items() if not is_adapter(folder)}
    bases = {name: base_folder(folder, FILES).resolve() for name, folder in folders.items() if is_adapter(folder)}
    return {name: names[base] for name, base in bases.items() if base in names}


def replaced_rows(folder: Path, int8: bool) -> tuple[WeightRow, ...]:
    """The parameters of its base model that an adapter replaces, such as an embedding of another vocabulary."""
    saved = read_settings(folder, loading.base_config(folder, files=FILES)).saved
    return tuple(leaf.row for row in saved for leaf in stored_leaves(row, "float32", int8))


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


def plan(config: TrainConfig, models: ModelShapes, devices: Any) -> Plan:
    """The run on these devices.

    Raises:
      UserError: for a mesh or batches that do not fit the devices or the models.
    """
    setup = resolve(config, devices)
    compute, sizes = config.compute, [shape.vocab_size for shape in models.shapes.values()]
    vocab = min(sizes if models.shared_vocab is None else [*sizes, models.shared_vocab])

    def model(shape: ModelConfig) -> Model:
        check_model(shape, setup.mesh, compute, setup.dtype)
        shape = dataclasses.replace(shape, output_vocab_size=vocab)
        return loading.make_model(shape, setup.mesh, compute, setup.dtype)

    made = {name: model(models.shapes[name]) for name in teacher_names(config)}
    frozen = {name: abstract_params(of, setup.mesh, setup.teacher_dtype) for name, of in made.items()}
    for name, base in models.bases.items():  # the shapes of arrays that are one array are one object
        own = tree_of({row.path: leaf_of(frozen[name], row.path) for row in models.replaced.get(name, ())})
        frozen[name] = adapters.attach(adapters.attach(frozen[base], own), adapters.all_leaves(frozen[name]))
    student = model(models.student)
    params = abstract_params(student, setup.mesh, compute.params)
    if student.config.adapter:
        params = adapters.attach(frozen["specialised"], adapters.all_leaves(params))
    state = abstract_run_state(trained(params, config.optimizer.trained), config)
    teachers = {name: (of, frozen[name]) for name, of in made.items()}
    of_branches: Any = {name: made[branch.teacher] for name, branch in config.branches.items()}
    run = Programs(setup, student, params, models.eos_ids, state, of_branches)
    return Plan(setup, student, params, state, teachers, run)


def without_shared(tree: Params, *others: Params) -> Params:
    """The arrays of a tree that are not among those of other trees too; None in place of these."""
    shared = {id(leaf) for leaf in jax.tree.leaves(others)}
    return jax.tree.map(lambda leaf: None if id(leaf) in shared else leaf, tree)


def abstract_params(model: Model, mesh: Mesh, dtype: str) -> Params:
    """A model's parameters with their shardings on a mesh.

    Args:
      dtype: of them; "int8" as in `models.quantised`.
    """
    config, dtype = model.config, model.dtype if dtype == INT8 else dtype
    of_leaves = shardings(config, mesh)

    def leaf(row: WeightRow) -> jax.ShapeDtypeStruct:
        shape, stored = row.shape(config.num_layers), leaf_dtype(config, row, dtype)
        return jax.ShapeDtypeStruct(shape, stored, sharding=leaf_of(of_leaves, row.path))

    return tree_of({row.path: leaf(row) for row in table(config)})


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
