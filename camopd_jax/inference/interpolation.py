"""The weighted mean of the parameters of the original and the specialised model (arXiv 2109.01903)."""

import jax
import jax.numpy as jnp

from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig
from camopd_jax.types import Params


def check_architectures(general: ModelConfig, specialised: ModelConfig, name: str) -> None:
    """Raises UserError if the two models have different architectures.

    Args:
      name: of the original model, for the error message.
    """
    if general != specialised:
        raise UserError(
            f"config.specialised_model: its architecture is not that of {name}; only a model made from the original "
            "can be averaged with it"
        )


def interpolated(general: Params, specialised: Params, weight: float) -> Params:
    """`weight * general + (1 - weight) * specialised`, computed in float32; dtypes and shardings are `specialised`'s.

    Args:
      weight: in [0, 1]; 0 gives `specialised` itself.
    """
    if weight == 0:
        return specialised

    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        return (weight * x.astype(jnp.float32) + (1 - weight) * y.astype(jnp.float32)).astype(y.dtype)

    shardings = jax.tree.map(lambda y: y.sharding, specialised)
    return jax.jit(lambda a, b: jax.tree.map(mean, a, b), out_shardings=shardings)(general, specialised)
