"""AdamW with gradient clipping and a learning-rate schedule over the steps of the run."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from camopd_jax.config.schema import Optimizer, SftConfig, TrainConfig
from camopd_jax.method.objectives import objective
from camopd_jax.models.weights import LORA_A, LORA_B
from camopd_jax.types import Params, Record, TrainState

# Weight decay applies to these parameters, not to norms and biases.
_DECAYED = ("kernel", "embedding", "per_layer_embedding", "head", LORA_A, LORA_B)


LAST_GRADIENT = "gradient@"  # before a branch's name, which has no @


def moment_names(config: TrainConfig | SftConfig) -> tuple[str, ...]:
    """Names of a run's Adam states, one that all branches share or one for each branch; and of its stored gradients.

    A gradient is stored of each branch against which another one is projected.
    """
    if isinstance(config, SftConfig):
        return ("shared",)
    against = {branch.project_against for branch in config.branches.values()} - {""}
    gradients = tuple(LAST_GRADIENT + name for name in config.branches if name in against)
    return (("shared",) if config.method.moments == "shared" else tuple(config.branches)) + gradients


def run_state(params: Params, config: TrainConfig | SftConfig) -> TrainState:
    """`init_state` with the moments, the average and the objectives' states of a run."""
    state = init_state(params, moment_names(config), config.optimizer.average is not None)
    return state.replace(objectives=jax.device_put(objective_states(config), state.step.sharding))


def abstract_run_state(params: Params, config: TrainConfig | SftConfig) -> TrainState:
    """The state of `run_state` as shapes with shardings; `params` may be shapes with shardings too."""
    state = abstract_state(params, moment_names(config), config.optimizer.average is not None)
    place = state.step.sharding
    numbers = jax.eval_shape(lambda: objective_states(config))
    return state.replace(
        objectives=jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), numbers)
    )


def objective_states(config: TrainConfig | SftConfig) -> dict[str, Record]:
    """The states before the first update of the branches' objectives that have one, by branch."""
    branches = {} if isinstance(config, SftConfig) else config.branches
    field = "config.branches.{}.objective"
    states = {name: objective(of.objective, field.format(name)).initial_state() for name, of in branches.items()}
    return {name: state for name, state in states.items() if state}


def init_state(params: Params, moments: Sequence[str] = ("shared",), average: bool = False) -> TrainState:
    """The state before the first update, on the devices of the parameters.

    The paper uses one Adam state for all branches. Its moments are means over the gradients of all branches, so a
    branch's scale r sets the weight of its gradients in these means, not the length of its steps.

    Args:
      params: the trained parameters.
      moments: names of the Adam states and stored gradients (`moment_names`), which are float32; empty if nothing is
        updated.
      average: whether there is an average of the parameters.
    """
    rest = abstract_state(params, moments).replace(params=None)
    shardings = jax.tree.map(lambda s: s.sharding, rest)
    zeros = jax.jit(  # one program for all arrays
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest), out_shardings=shardings
    )()
    copies = jax.tree.map(lambda p: jnp.copy(p.astype(jnp.float32)), params) if average else {}
    return zeros.replace(params=params, average=copies)


def abstract_state(params: Params, moments: Sequence[str] = ("shared",), average: bool = False) -> TrainState:
    """The state of `init_state` as shapes with shardings; `params` may be shapes with shardings too."""
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), params)
    adam = _placed(jax.eval_shape(optax.scale_by_adam().init, like), params)
    zero = _placed(jax.ShapeDtypeStruct((), jnp.int32), params)
    averages = _placed(like, params) if average else {}
    of_names = {name: like if name.startswith(LAST_GRADIENT) else adam for name in moments}
    return TrainState(zero, params, of_names, averages)


def learning_rate(config: Optimizer, steps: int, step: jax.Array) -> jax.Array:
    """The learning rate of update `step` (from 0) of `steps`: linear warm-up, then constant or a cosine to 0."""
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warm
    done = jnp.clip((step - config.warmup_steps) / max(1, steps - config.warmup_steps), 0, 1)
    return config.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * done))


def apply(
    params: Params,
    moments: Any,
    grads: Params,
    rate: jax.Array,
    config: Optimizer,
    finite: jax.Array,
    against: Params | None = None,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """One AdamW step if `finite` is true and the gradient is finite; else parameters and moments stay unchanged.

    A gradient whose global norm exceeds `clip_norm` is scaled down to it. If every gradient is clipped, all have the
    same norm, and the branches' scales r have no effect; `grad_clipped` shows this.

    A skipped step is computed with decays of 1 and a gradient of 0, so that old and new values are never both in
    memory.

    Args:
      against: a gradient; the displacement of the parameters is projected so that it does not climb along it.

    Returns:
      New parameters and moments, and {"grad_norm", "grad_clipped" (0 or 1), "learning_rate", "finite"}.
    """
    norm = optax.global_norm(grads)
    finite &= jnp.isfinite(norm)
    clipped = jnp.bool_(False)
    if config.clip_norm is not None:
        clipped = norm > config.clip_norm
        factor = jnp.where(clipped, config.clip_norm / norm, 1.0)
        grads = jax.tree.map(lambda g: g * factor, grads)
    grads = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
    decays = {"b1": jnp.where(finite, config.b1, 1.0), "b2": jnp.where(finite, config.b2, 1.0)}
    updates, new = optax.scale_by_adam(**decays, eps=config.eps).update(grads, moments)
    moments = new._replace(count=jnp.where(finite, new.count, moments.count))

    def displacement(path: tuple[jax.tree_util.DictKey, ...], p: jax.Array, u: jax.Array) -> jax.Array:
        if path[-1].key in _DECAYED:
            u = u + config.weight_decay * p.astype(jnp.float32)
        return -jnp.where(finite, rate * u, 0)

    moved = jax.tree_util.tree_map_with_path(displacement, params, updates)
    if against is not None:
        moved = project(moved, against)
    params = jax.tree.map(lambda p, d: (p.astype(jnp.float32) + d).astype(p.dtype), params, moved)
    stats = {"grad_norm": norm, "grad_clipped": clipped.astype(jnp.float32), "learning_rate": jnp.asarray(rate),
             "finite": finite}  # fmt: skip
    return params, moments, stats


def averaged(average: Params, params: Params, decay: float, updates: jax.Array, finite: jax.Array) -> Params:
    """The exponential average of the parameters after one more update.

    `a_t = a_(t-1) + (1 - d) / (1 - d^t) (p_t - a_(t-1))`: the parameters after update i have a weight proportional to
    d^(t-i), those before the first update none (the bias correction of Adam, arXiv 1412.6980, on weights).

    Args:
      average: a_(t-1), float32.
      params: p_t.
      updates: int32[], t, from 1.
      finite: whether the update was done; False: the average stays unchanged.
    """
    weight = jnp.where(finite, (1 - decay) / (1 - decay ** updates.astype(jnp.float32)), 0)
    return jax.tree.map(lambda a, p: a + weight * (p.astype(jnp.float32) - a), average, params)


def project(displacement: Params, gradient: Params) -> Params:
    """`d - max(g . d, 0) / (g . g) g`: a displacement d that, to first order, does not raise the loss of gradient g."""
    climb = jnp.maximum(optax.tree.vdot(gradient, displacement), 0)
    square = optax.tree.vdot(gradient, gradient)
    factor = jnp.where(square > 0, climb / jnp.where(square > 0, square, 1), 0)
    return jax.tree.map(lambda d, g: d - factor * g, displacement, gradient)


def _placed(shapes: Any, params: Params) -> Any:
    """Adds shardings to shapes: trees like `params` get the parameters' shardings, other shapes are replicated.

    A scalar then has the same sharding before and after an update, so that no program compiles twice.
    """
    mirrors: Any = jax.tree.structure(params)
    sharding = jax.tree.leaves(params)[0].sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding

    def put(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def fill(node: Any) -> Any:
        if mirrors == jax.tree.structure(node):
            return jax.tree.map(lambda s, p: put(s, p.sharding), node, params)
        return put(node, replicated)

    return jax.tree.map(fill, shapes, is_leaf=lambda node: mirrors == jax.tree.structure(node))
