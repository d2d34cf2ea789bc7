"""The feed-forward of a mixture of experts: a router sends each token to a few of them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from camopd_jax.models.config import ModelConfig, Routing
from camopd_jax.models.products import einsum, multiply_to_float32, precision
from camopd_jax.models.weights import KERNEL_SCALE
from camopd_jax.runtime.mesh import EXPERT, batch_shards, sharding
from camopd_jax.types import Params

# Of the router and the experts' matrices: kernels, and biases if there are any; the router may have a factor of each
# expert, "scale"
Weights = dict[str, Params]
Inputs = tuple[jax.Array, jax.Array]
Gated = Callable[[jax.Array, jax.Array], jax.Array]  # (gate x, up x) -> the input of `down`


class Experts(nn.Module):
    """The sum of `down(gated(gate x, up x))` over each token's experts, times their weights.

    The router reads another array than the experts if it is given.

    No token is dropped: tokens are sorted by expert, and products of groups of rows (`jax.lax.ragged_dot`) compute all
    experts at once. Every device does this for its own rows, its own experts and its part of each expert's width; the
    results are summed over devices.
    """

    config: ModelConfig
    mesh: Mesh | None
    gated: Gated

    @nn.compact
    def __call__(self, x_BSD: jax.Array, to_route_BSD: jax.Array | None = None) -> jax.Array:
        c, inputs = self.config, (x_BSD, x_BSD if to_route_BSD is None else to_route_BSD)
        assert c.routing is not None
        d, f, e, std = c.hidden_size, c.intermediate_size, c.routing.experts, c.initializer_range
        shapes = {"router": (d, e), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
        weights = {
            name: _Linear(shape, c.mlp_bias, std, c.routing.scaled and name == "router", name=name)(x_BSD.dtype)
            for name, shape in shapes.items()
        }
        compute = partial(_routed, routing=c.routing, gated=self.gated)
        if self.mesh is None or x_BSD.shape[0] % batch_shards(self.mesh):
            return compute(inputs, weights)
        rows, specs = sharding(self.mesh, "batch", "sequence", None).spec, _specs(weights, self.mesh)
        axes = [axis for axis in (EXPERT, "tensor") if self.mesh.shape.get(axis, 1) > 1]

        def local(inputs: Inputs, weights: Weights) -> jax.Array:
            if "tensor" in axes and c.mlp_bias:  # one device adds the bias of the sum
                first, down = jax.lax.axis_index("tensor") == 0, weights["down"]
                weights = weights | {"down": down | {"bias": jnp.where(first, down["bias"], 0)}}
            y = compute(inputs, weights, shard=jax.lax.axis_index(EXPERT) if EXPERT in axes else 0)
            return jax.lax.psum(y, axes) if axes else y

        split = jax.shard_map(local, mesh=self.mesh, in_specs=(rows, specs), out_specs=rows, check_vma=False)
        return split(inputs, weights)


_AXES = {  # logical axes of the kernels; the model width is complete
    "router": (None, None),
    "gate": ("experts", None, "mlp"),
    "up": ("experts", None, "mlp"),
    "down": ("experts", "mlp", None),
}


def _specs(weights: Weights, mesh: Mesh) -> dict[str, dict[str, PartitionSpec]]:
    """How a layer's weights are divided; a bias or scale has the axes of its kernel but the inputs."""

    def of(name: str, leaf: str) -> PartitionSpec:
        axes = _AXES[name] if leaf == "kernel" else (*_AXES[name][:-2], _AXES[name][-1])
        return sharding(mesh, *axes).spec

    return {name: {leaf: of(name, leaf) for leaf in leaves} for name, leaves in weights.items()}


class _Linear(nn.Module):
    """The leaves of one matrix, or of one for each expert."""

    shape: tuple[int, ...]
    bias: bool
    initializer_range: float
    scaled: bool = False

    @nn.compact
    def __call__(self, dtype: jnp.dtype) -> Params:
        """The leaves in a dtype, but a scale in its own; a kernel in int8 is multiplied by its scale."""
        kernel = self.param("kernel", nn.initializers.normal(self.initializer_range), self.shape)
        if self.has_variable("params", KERNEL_SCALE):
            scale = jnp.broadcast_to(self.get_variable("params", KERNEL_SCALE)[..., None, :], self.shape)
            kernel = kernel.astype(jnp.float32) * scale
        leaves = {"kernel": kernel.astype(dtype)}
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (*self.shape[:-2], self.shape[-1]))
            leaves["bias"] = bias.astype(dtype)
        if self.scaled:
            leaves["scale"] = self.param("scale", nn.initializers.ones, self.shape[-1:])
        return leaves


def _routed(
    inputs: Inputs, weights: Weights, *, routing: Routing, gated: Gated, shard: jax.Array | int = 0
) -> jax.Array:
    """`Experts` of one device. Its part of the experts and of their width makes the result a part of the sum.

    Args:
      inputs: [B, S, D] of the experts, and of the router.
      shard: the number of the device's part of the experts.
    """
    present = weights["gate"]["kernel"].shape[0]  # experts, of all `routing.experts`
    x_ND, to_route_ND = (x_BSD.reshape(-1, x_BSD.shape[-1]) for x_BSD in inputs)
    weights_NE, experts_NE = route(to_route_ND, weights["router"], routing)  # E: the experts of a token
    experts_NE -= shard * present
    experts_NE = jnp.where((experts_NE >= 0) & (experts_NE < present), experts_NE, present)  # others last
    order = jnp.argsort(experts_NE.reshape(-1))  # pairs of token and expert, sorted by expert
    sorted_ND = x_ND[order // routing.per_token]
    of_pairs = experts_NE.reshape(-1)[order]
    sizes = jnp.bincount(of_pairs, length=present)

    def product(x: jax.Array, name: str) -> jax.Array:
        y = jax.lax.ragged_dot(x, weights[name]["kernel"], sizes, precision=precision(x.dtype))
        return y + weights[name]["bias"].at[of_pairs].get(mode="clip") if "bias" in weights[name] else y

    y = gated(product(sorted_ND, "gate"), product(sorted_ND, "up"))
    y = product(y, "down")
    if present < routing.experts:
        y = jnp.where((of_pairs < present)[:, None], y, 0)
    y_NED = y[jnp.argsort(order)].reshape(*experts_NE.shape, -1)
    return einsum("ne,ned->nd", weights_NE.astype(y.dtype), y_NED).reshape(inputs[0].shape)


def route(x_ND: jax.Array, router: Params, routing: Routing) -> tuple[jax.Array, jax.Array]:
    """Each token's experts: their weights, float32[N, per_token], and indices, int32[N, per_token]."""
    logits = multiply_to_float32("nd,de->ne", x_ND, router["kernel"])
    if "bias" in router:
        logits += jnp.broadcast_to(router["bias"].astype(jnp.float32), logits.shape)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), routing.per_token)
    if routing.normalized:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    if "scale" in router:
        weights *= router["scale"].astype(jnp.float32)[experts]
    return weights, experts
