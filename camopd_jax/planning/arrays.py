"""A run's arrays as shapes: `jax.ShapeDtypeStruct`s that carry the shardings which the run's own will have, on devices
that need not be there.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from camopd_jax.config.schema import TrainConfig
from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.method.optimizer import abstract_state
from camopd_jax.method.update import Gradient
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import leaf_of, shardings, table, tree_of
from camopd_jax.rollout import decode as steps
from camopd_jax.rollout.decode import Decoding
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.mesh import mesh_of, sharding
from camopd_jax.types import (
    Batch,
    KVCache,
    LanguageModel,
    LogProbs,
    Params,
    Prompts,
    Residuals,
    Rollout,
    Selection,
    TrainState,
)


@dataclass(frozen=True)
class Models:
    """The run's two checkpoints, of which only config.json is known."""

    general: ModelConfig
    specialised: ModelConfig
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is compiled, and what else lies on the devices meanwhile."""

    config: TrainConfig
    mesh: Mesh
    rollout_mesh: Mesh
    student: LanguageModel
    state: TrainState  # all of it abstract, as the next two
    teachers: dict[str, tuple[LanguageModel, Params]]  # "general", "specialised"
    batch: Batch  # of the branch with the most rows
    prompt_slots: int
    rows: int
    places: int  # answered at one time

    @property
    def slots(self) -> int:
        """Of the longest prompt and answer together."""
        return self.prompt_slots + self.config.rollout.max_response_tokens


def plan(config: TrainConfig, models: Models, devices: Any, platform: str) -> Plan:
    """The run's arrays on these devices, at its largest shape bucket.

    Raises:
      UserError: for a mesh or batches that do not fit the devices or the models.
    """
    mesh = mesh_of(config.mesh, devices)
    loop.check_batches(config, mesh)
    vocab = min(models.general.vocab_size, models.specialised.vocab_size)
    dtype = loading.matmul_dtype(config.compute, platform)

    def model(shape: ModelConfig) -> Model:
        shape = dataclasses.replace(shape, output_vocab_size=vocab)
        return Model(shape, mesh=mesh, dtype=dtype, remat=config.compute.remat, attention=config.compute.attention)

    general, student = model(models.general), model(models.specialised)
    of_teacher = loading.teacher_dtype(config.compute, platform)
    teachers = {
        "general": (general, abstract_params(general.config, mesh, of_teacher)),
        "specialised": (student, abstract_params(student.config, mesh, of_teacher)),
    }
    rows = max(loop.batch_rows(config).values())
    rollout = config.rollout
    slots = min(rollout.max_prompt_tokens, bucket(rollout.max_prompt_tokens, rollout.smallest_bucket))
    return Plan(
        config=config,
        mesh=mesh,
        rollout_mesh=loop.rollout_mesh(config, mesh),
        student=student,
        state=abstract_state(abstract_params(student.config, mesh, config.compute.params), config.method.moments),
        teachers=teachers,
        batch=abstract_batch(mesh, rows, slots, rollout.max_response_tokens),
        prompt_slots=slots,
        rows=rows,
        places=min(rollout.places or rows, rows),
    )


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The parameters as they will lie on the mesh."""
    places = shardings(config, mesh)
    return tree_of({
        row.path: jax.ShapeDtypeStruct(row.shape(config.num_layers), dtype, sharding=leaf_of(places, row.path))
        for row in table(config)
    })  # fmt: skip


def decoding_params(model: LanguageModel, params: Params) -> Params:
    """What `model.for_decoding` makes of the parameters, on the model's mesh: each layer's apart."""
    bare = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    shapes = jax.eval_shape(model.for_decoding, bare)
    return _placed(shapes, model.decoding_places)


def decoding_state(
    model: LanguageModel, places: int, prompt_slots: int, ring: int, max_new: int, keep_residuals: bool = False
) -> Decoding:
    """Answers in the making, with so many slots of cache behind the prompts."""

    def of_places(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((places, *shape), dtype)

    c, number, slots = model.config, of_places(jnp.int32), prompt_slots + ring
    stream = (of_places(model.dtype, slots, c.hidden_size),) * (c.num_layers + 1)
    heads = (of_places(model.dtype, c.num_kv_heads, slots, c.head_dim),) * c.num_layers
    state = Decoding(
        row=number,
        prompt_lengths=number,
        keys=abstract_keys(places),
        tokens=of_places(jnp.int32, max_new),
        log_probs=of_places(jnp.float32, max_new),
        entropy=of_places(jnp.float32),
        lengths=number,
        stopped=of_places(jnp.bool_),
        cache=KVCache(heads, heads, of_places(jnp.int32, slots), stream if keep_residuals else ()),
        slot=jax.ShapeDtypeStruct((), jnp.int32),
    )
    return _placed(state, steps.shardings(model.mesh))


def abstract_keys(rows: int, mesh: Mesh | None = None) -> jax.ShapeDtypeStruct:
    """A random key for each row."""
    keys = jax.eval_shape(lambda index_B: row_keys(0, 0, index_B), jax.ShapeDtypeStruct((rows,), jnp.int32))
    return keys if mesh is None else _placed(keys, sharding(mesh, "batch"))


def abstract_residuals(p: Plan, rows: int) -> Residuals:
    """The residual stream of so many prompts with answers of the cap's length, where it waits for the gradient."""
    c = p.student.config
    shape = (rows, p.slots, c.hidden_size)
    array = jax.ShapeDtypeStruct(shape, p.student.dtype, sharding=sharding(p.mesh, "batch"))
    return (array,) * (c.num_layers + 1)


def abstract_gradient(params: Params) -> Gradient:
    """Summed over answers, in the places of the parameters."""
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return Gradient(jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding(mesh)), like)


def abstract_batch(mesh: Mesh, rows: int, prompt_slots: int, answer_slots: int) -> Batch:
    """Scored answers, split over the batch axes; a selection's order and count are whole everywhere."""

    def of_rows(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding(mesh, "batch"))

    lengths = of_rows(dtype=jnp.int32)
    return Batch(
        prompts=Prompts(of_rows(prompt_slots, dtype=jnp.int32), lengths),
        index=lengths,
        rollout=Rollout(
            of_rows(answer_slots, dtype=jnp.int32), lengths, of_rows(answer_slots), of_rows(), of_rows(dtype=jnp.bool_)
        ),
        scores=LogProbs(of_rows(answer_slots), of_rows(answer_slots)),
        selection=Selection(
            score=of_rows(),
            order=jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding(mesh)),
            count=jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding(mesh)),
            weights=of_rows(),
        ),
    )


def _placed(shapes: Any, places: Any) -> Any:
    """Shapes with places; a place stands for all that is below it."""

    def put(place: NamedSharding, below: Any) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), below)

    return jax.tree.map(put, places, shapes)


def chip_bytes(tree: Any) -> int:
    """Bytes that arrays of these shapes and shardings have on one device."""

    def size(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
