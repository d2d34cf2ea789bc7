"""AdamW, a learning rate that follows the run's own step, and a clip that tells when it bites."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from camopd_jax.config.schema import Optimizer, TrainConfig
from camopd_jax.types import Params, TrainState

# Parameters that decay; norms and biases do not.
_DECAYED = ("kernel", "embedding", "head")


def moment_names(config: TrainConfig) -> tuple[str, ...]:
    """Of the Adam states of a run: one that all branches share, or one for each."""
    return ("shared",) if config.method.moments == "shared" else tuple(config.branches)


def init_state(params: Params, moments: Sequence[str] = ("shared",)) -> TrainState:
    """The state before the first update, on the devices of the parameters.

    One shared Adam state is the published method. With it, what the moments remember of one branch acts in the other: a
    branch's scale r is its weight in that memory, not the length of its step.

    Args:
      params: those that are trained.
      moments: names of the Adam states, float32 (`moment_names`); none, where nothing is updated.
    """
    rest = abstract_state(params, moments).replace(params=None)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), rest)
    return zeros.replace(params=params)


def abstract_state(params: Params, moments: Sequence[str] = ("shared",)) -> TrainState:
    """The state of `init_state` as shapes with their shardings; of the parameters too, shapes are enough."""
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), params)
    adam = _placed(jax.eval_shape(optax.scale_by_adam().init, like), params)
    zero = _placed(jax.ShapeDtypeStruct((), jnp.int32), params)
    return TrainState(zero, params, dict.fromkeys(moments, adam))


def learning_rate(config: Optimizer, steps: int, step: jax.Array) -> jax.Array:
    """The rate of update number `step` (from 0) of `steps`: linear warm-up, then constant or a cosine to 0."""
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warm
    done = jnp.clip((step - config.warmup_steps) / max(1, steps - config.warmup_steps), 0, 1)
    return config.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * done))


def apply(
    params: Params, moments: Any, grads: Params, rate: jax.Array, config: Optimizer, sound: jax.Array
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """One AdamW step where `sound` and the gradient is finite; else everything stays as it is.

    The gradient is scaled down to global norm `clip_norm` where it is longer. A clip that bites at every
    step makes all gradients equally long and so cancels the branches' scales r: `grad_clipped` tells.

    A step that is not taken is one with decays of 1 and a gradient of 0: so the old values need not be kept beside
    the new ones.

    Returns:
      New parameters and moments, and {"grad_norm", "grad_clipped" (0 or 1), "learning_rate", "sound"}.
    """
    norm = optax.global_norm(grads)
    sound &= jnp.isfinite(norm)
    clipped = jnp.bool_(False)
    if config.clip_norm is not None:
        clipped = norm > config.clip_norm
        factor = jnp.where(clipped, config.clip_norm / norm, 1.0)
        grads = jax.tree.map(lambda g: g * factor, grads)
    grads = jax.tree.map(lambda g: jnp.where(sound, g, 0), grads)
    decays = {"b1": jnp.where(sound, config.b1, 1.0), "b2": jnp.where(sound, config.b2, 1.0)}
    updates, new = optax.scale_by_adam(**decays, eps=config.eps).update(grads, moments)
    moments = new._replace(count=jnp.where(sound, new.count, moments.count))

    def move(path: tuple[jax.tree_util.DictKey, ...], p: jax.Array, u: jax.Array) -> jax.Array:
        wide = p.astype(jnp.float32)
        if path[-1].key in _DECAYED:
            u = u + config.weight_decay * wide
        return (wide - jnp.where(sound, rate * u, 0)).astype(p.dtype)

    params = jax.tree_util.tree_map_with_path(move, params, updates)
    stats = {"grad_norm": norm, "grad_clipped": clipped.astype(jnp.float32), "learning_rate": jnp.asarray(rate),
             "sound": sound}  # fmt: skip
    return params, moments, stats


def _placed(shapes: Any, params: Params) -> Any:
    """Shapes with shardings. Those that mirror the parameters lie as the parameters lie, others on every device: a
    scalar that an update returns has the sharding it had before, so that no program compiles twice.
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
