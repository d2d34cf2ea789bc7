"""The feed-forward of a mixture of experts: a router sends each token to a few of them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.models.config import ModelConfig, Routing
from camopd_jax.models.products import einsum, multiply_to_float32, precision
from camopd_jax.models.weights import KERNEL_SCALE
from camopd_jax.runtime.mesh import batch_shards, spec

Kernels = dict[str, jax.Array]


class Experts(nn.Module):
    """The sum of `down(activation(gate x) * up x)` over each token's experts, times their weights.

    No token is dropped: tokens are sorted by expert, and products of groups of rows (`jax.lax.ragged_dot`) compute all
    experts at once. Every device does this for its own rows and its own part of each expert's width.
    """

    config: ModelConfig
    mesh: Mesh | None
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        c = self.config
        assert c.routing is not None
        d, f, e, std = c.hidden_size, c.intermediate_size, c.routing.experts, c.initializer_range
        shapes = {"router": (d, e), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
        kernels = {name: _Kernel(shape, std, name=name)(x_BSD.dtype) for name, shape in shapes.items()}
        compute = partial(_routed, routing=c.routing, activation=self.activation)
        if self.mesh is None or x_BSD.shape[0] % batch_shards(self.mesh):
            return compute(x_BSD, kernels)
        wide, rows = spec(None, None, "mlp"), spec("batch", "sequence", None)
        of_kernels = {"router": spec(None, None), "gate": wide, "up": wide, "down": spec(None, "mlp", None)}
        tensor = self.mesh.shape["tensor"] > 1

        def local(x_BSD: jax.Array, kernels: Kernels) -> jax.Array:
            y = compute(x_BSD, kernels)
            return jax.lax.psum(y, "tensor") if tensor else y

        split = jax.shard_map(local, mesh=self.mesh, in_specs=(rows, of_kernels), out_specs=rows, check_vma=False)
        return split(x_BSD, kernels)


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    initializer_range: float

    @nn.compact
    def __call__(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel in a dtype; one in int8 is multiplied by its scale."""
        kernel: jax.Array = self.param("kernel", nn.initializers.normal(self.initializer_range), self.shape)
        if self.has_variable("params", KERNEL_SCALE):
            scale = jnp.broadcast_to(self.get_variable("params", KERNEL_SCALE)[..., None, :], self.shape)
            kernel = kernel.astype(jnp.float32) * scale
        return kernel.astype(dtype)


def _routed(
    x_BSD: jax.Array, kernels: Kernels, routing: Routing, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`Experts` of one device. Its part of the experts' width makes the result a part of the sum over devices."""
    x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
    weights_NE, experts_NE = route(x_ND, kernels["router"], routing)  # E: the experts of a token
    order = jnp.argsort(experts_NE.reshape(-1))  # pairs of token and expert, sorted by expert
    sorted_ND = x_ND[order // routing.per_token]
    sizes = jnp.bincount(experts_NE.reshape(-1), length=routing.experts)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, kernel, sizes, precision=precision(x.dtype))

    y = activation(product(sorted_ND, kernels["gate"])) * product(sorted_ND, kernels["up"])
    y_NED = product(y, kernels["down"])[jnp.argsort(order)].reshape(*experts_NE.shape, -1)
    return einsum("ne,ned->nd", weights_NE.astype(y.dtype), y_NED).reshape(x_BSD.shape)


def route(x_ND: jax.Array, router_DE: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
    """Each token's experts: their weights, float32[N, per_token], and indices, int32[N, per_token]."""
    logits = multiply_to_float32("nd,de->ne", x_ND, router_DE)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), routing.per_token)
    return (weights / jnp.sum(weights, axis=-1, keepdims=True) if routing.normalized else weights), experts
