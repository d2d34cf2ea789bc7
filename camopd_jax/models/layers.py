"""The parts of a decoder layer, as stateless Linen modules.

Parameters are cast to the compute dtype when they are used; norms, rotations and softmax are computed in float32.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from camopd_jax.models.attention import attend
from camopd_jax.models.config import AttentionSpec, Implementation, ModelConfig
from camopd_jax.models.experts import Experts
from camopd_jax.models.products import multiply
from camopd_jax.models.rope import Rope, frequencies
from camopd_jax.models.weights import KERNEL_SCALE, LORA_A, LORA_B, LORA_SCALE
from camopd_jax.runtime.mesh import ACTIVATION, RESIDUAL, constrain, constrain_even
from camopd_jax.types import Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Positions(struct.PyTreeNode):
    """Positions of the tokens in their rows, the same for every layer."""

    tokens: jax.Array  # int32[B or 1, S]
    rotation: tuple[jax.Array, jax.Array]  # cosines and sines of the model's RoPEs, float32[., B or 1, S, R / 2]
    global_rotation: tuple[jax.Array, jax.Array] | None = None  # in layers with `global_attention`

    def of_global(self) -> "Positions":
        """The positions in layers with `global_attention`."""
        assert self.global_rotation is not None
        return Positions(self.tokens, self.global_rotation)


class LayerKind(struct.PyTreeNode):
    """The differences between layers other than parameters: ints, or arrays in a scan over layers."""

    rope: jax.Array | int  # index of the RoPE
    window: jax.Array | int  # index of the attention window
    # In models with `global_attention`: whether this is such a layer, and its entry in each attention's stack
    is_global: jax.Array | bool = False
    entries: dict[str, jax.Array] = struct.field(default_factory=dict)


class LayerCache(struct.PyTreeNode):
    """Keys and values of earlier tokens in one layer. A call adds those of its tokens."""

    keys: jax.Array  # [B, G, S', K]
    values: jax.Array  # [B, G, S', K]
    positions: jax.Array  # int32[B, S'], of each slot's token, including the new ones; EMPTY: no token
    slot: jax.Array  # int32[], the slot of the first new token


KeysValues = tuple[jax.Array, jax.Array]  # [B, G, S', K] each


class LayerInputs(struct.PyTreeNode):
    """The inputs of a layer beside the residual stream, in models that have them."""

    per_layer: jax.Array | None = None  # [B, S, E], of this layer (`config.PerLayerInput`)
    # Of other layers, by the name of the attention that uses them
    shared: dict[str, KeysValues] = struct.field(default_factory=dict)


class Norm(nn.Module):
    """`normalized` with trained weights."""

    config: ModelConfig
    axes: int = 1  # the last so many, which are normalised together

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, shape = self.config, x.shape[-self.axes :]
        weights = {"scale": self.param("scale", nn.initializers.constant(1.0 - c.norm_offset), shape)}
        if c.norm_bias:
            weights["shift"] = self.param("shift", nn.initializers.zeros, shape)
        return normalized(x, weights, c)


def normalized(x: jax.Array, weights: Params, c: ModelConfig) -> jax.Array:
    """`x / rms(x) * (offset + scale) + shift` in float32, over as many last axes as `scale` has.

    https://arxiv.org/abs/1910.07467, Eq 4; with the norm "layer", the mean is subtracted from x first.
    """
    y, scale = x.astype(jnp.float32), weights["scale"]
    axes = range(-scale.ndim, 0)
    if c.norm == "layer":
        y -= jnp.mean(y, axis=axes, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + c.norm_eps)
    y *= jnp.broadcast_to(c.norm_offset + scale.astype(jnp.float32), y.shape)
    if "shift" in weights:
        y += jnp.broadcast_to(weights["shift"].astype(jnp.float32), y.shape)
    return y.astype(x.dtype)


class Scalar(nn.Module):
    """Multiplies by a constant of the checkpoint, which is not trained."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jax.lax.stop_gradient(self.param("scale", nn.initializers.ones, (1,)))
        return (x.astype(jnp.float32) * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


class Linear(nn.Module):
    """`einsum(equation, x, kernel) + bias`, and `low_rank` of an adapter if there is one beside the kernel.

    With a kernel in int8, the product is multiplied by the scale of each output (`models.quantised`).
    """

    equation: str
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None
    initializer_range: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.initializer_range), self.kernel_shape)
        y = multiply(self.equation, x, kernel.astype(x.dtype))
        if self.has_variable("params", KERNEL_SCALE):
            scale = jnp.broadcast_to(self.get_variable("params", KERNEL_SCALE), y.shape)
            y = (y.astype(jnp.float32) * scale).astype(x.dtype)
        if self.bias_shape is not None:
            bias = self.param("bias", nn.initializers.zeros, self.bias_shape)
            y += jnp.broadcast_to(bias.astype(x.dtype), y.shape)
        if self.has_variable("params", LORA_A):
            leaves: list[jax.Array] = [self.get_variable("params", name) for name in (LORA_A, LORA_B, LORA_SCALE)]
            y += low_rank(self.equation, x, *leaves)
        return y


def low_rank(equation: str, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """`scale (x A) B`, what an adapter adds to a layer's output (arXiv 2106.09685, Eq 3).

    Args:
      equation: of x and the kernel, whose inputs are A's first axes and whose outputs are B's last axes.
      scale: float32[].
    """
    left_right, output = equation.split("->")
    left, right = left_right.split(",")
    rows = "".join(axis for axis in left if axis not in right)
    inputs = "".join(axis for axis in right if axis in left)
    outputs = right.removeprefix(inputs)
    narrow = multiply(f"{left},{inputs}r->{rows}r", x, a.astype(x.dtype))
    narrow = (narrow.astype(jnp.float32) * scale).astype(x.dtype)
    return multiply(f"{rows}r,r{outputs}->{output}", narrow, b.astype(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the given tokens or over a cache with these tokens added."""

    config: ModelConfig
    mesh: Mesh | None
    implementation: Implementation  # of attention over complete rows
    over_cache: Implementation  # of attention over a cache

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        positions: Positions,
        kind: LayerKind,
        cache: LayerCache | None = None,
        shared: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The output `[B, S, D]`, and the keys and values: of the cache with these tokens, or only of these tokens.

        Args:
          shared: the keys and values, if they are another layer's; of the cache, only its positions are then read.
        """
        c = self.config
        std = c.initializer_range

        def project(name: str, heads: int, axis: str) -> jax.Array:
            shape = (heads, c.head_dim)
            bias = shape if c.qkv_bias else None
            y = Linear("bsd,dhk->bshk", (c.hidden_size, *shape), bias, std, name=name)(x_BSD)
            return constrain(y, self.mesh, "batch", "sequence", axis, None)

        def placed(name: str, x: jax.Array) -> jax.Array:
            """Queries or keys with their norm and rotation."""
            if c.qk_norm is not None:
                x = Norm(c, 1 if c.qk_norm == "head" else 2, name=f"{name}_norm")(x)
            cos, sin = (table[kind.rope] for table in positions.rotation)
            return rotate(x, cos, sin, c.interleaved_rope)

        query = placed("query", project("query", c.num_heads, "heads"))
        if c.query_growth is not None:
            query = _grown(query, positions.tokens, *c.query_growth)
        if c.shares_keys:
            assert shared is not None
            key, value = shared
        else:
            key = project("key", c.num_kv_heads, "kv_heads")
            value = key if c.keys_as_values else project("value", c.num_kv_heads, "kv_heads")
            if c.value_norm:
                value = normalized(value, {"scale": jnp.ones(c.head_dim)}, c)
            key, value = placed("key", key).swapaxes(1, 2), value.swapaxes(1, 2)
            if cache is not None:
                start = (0, 0, cache.slot, 0)
                key = jax.lax.dynamic_update_slice(cache.keys, key, start)
                value = jax.lax.dynamic_update_slice(cache.values, value, start)
        settings = c.distinct_windows, c.query_scale, c.attention_softcap
        spec = AttentionSpec(*settings, self.implementation, self.mesh, self.over_cache)
        key_positions = None if cache is None else cache.positions
        sinks = None
        if c.attention_sinks:
            sinks = self.param("sinks", nn.initializers.normal(std), (c.num_heads,))
        out = attend(query, key, value, positions.tokens, key_positions, spec, kind.window, sinks)
        bias = (c.hidden_size,) if c.output_bias else None
        out = Linear("bshk,hkd->bsd", (c.num_heads, c.head_dim, c.hidden_size), bias, std, name="output")(out)
        return out, (key, value)


def gated_activation(c: ModelConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product of a feed-forward's gate and up, as a function of both."""
    if c.clamped_swiglu is None:
        activation = ACTIVATIONS[c.activation]
        return lambda gate, up: activation(gate) * up
    slope, limit = c.clamped_swiglu

    def clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(slope * gate) * (up + 1)

    return clamped


class FeedForward(nn.Module):
    """`down(activation(gate x) * up x)`, or without a gate `down(activation(up x))`."""

    config: ModelConfig
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        c = self.config
        d, f, std = c.hidden_size, c.feed_forward_size, c.initializer_range
        wide, narrow = ((f,), (d,)) if c.mlp_bias else (None, None)
        activation = ACTIVATIONS[c.activation]

        def project(name: str) -> jax.Array:
            return Linear("bsd,df->bsf", (d, f), wide, std, name=name)(x_BSD)

        y = activation(project("gate")) * project("up") if c.gated_mlp else activation(project("up"))
        y = constrain(y, self.mesh, "batch", "sequence", "mlp")
        return Linear("bsf,fd->bsd", (f, d), narrow, std, name="down")(y)


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each with norms before or after it and added to the residual
    stream.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    implementation: Implementation = "xla"  # of attention over complete rows
    over_cache: Implementation = "xla"  # of attention over a cache

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        positions: Positions,
        kind: LayerKind,
        cache: LayerCache | None = None,
        per_layer_BSE: jax.Array | None = None,
        shared: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The layer's output `[B, S, D]`, and the keys and values of `Attention`.

        Args:
          per_layer_BSE: `LayerInputs.per_layer`.
          shared: as in `Attention`.
        """
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return Norm(c, name=name)(x)

        def entering(x: jax.Array, pre_norm: str) -> jax.Array:
            return constrain(norm(pre_norm, x) if c.pre_norms else x, self.mesh, *ACTIVATION)

        def split(x: jax.Array) -> jax.Array:
            return constrain_even(x, self.mesh, *RESIDUAL)

        def added(x: jax.Array, y: jax.Array, post_norm: str) -> jax.Array:
            y = split(y)
            return split(x + scaled(norm(post_norm, y) if c.post_norms else y, c.residual_scale))

        attention = Attention(c, self.mesh, self.implementation, self.over_cache, name="attention")
        first = entering(x_BSD, "attention_norm")
        y, keys_values = attention(first, positions, kind, cache, shared)
        x_BSD = added(x_BSD, y, "post_attention_norm")
        second = first if c.parallel else entering(x_BSD, "mlp_norm")
        if c.routing is None:
            y = FeedForward(c, self.mesh, name="mlp")(second)
        elif c.dense_size is None:
            y = Experts(c, self.mesh, gated_activation(c), name="mlp")(second)
        else:
            y = split(norm("post_dense_norm", FeedForward(c, self.mesh, name="mlp")(second)))
            third, to_route = entering(x_BSD, "experts_norm"), entering(x_BSD, "router_norm")
            experts = Experts(c, self.mesh, gated_activation(c), name="experts")
            y += split(norm("post_experts_norm", experts(third, scaled(to_route, c.hidden_size**-0.5))))
        x_BSD = added(x_BSD, y, "post_mlp_norm")
        if c.per_layer_input is not None:
            d, e, std = c.hidden_size, c.per_layer_input.size, c.initializer_range
            gate = ACTIVATIONS[c.activation](Linear("bsd,de->bse", (d, e), None, std, name="input_gate")(x_BSD))
            assert per_layer_BSE is not None
            y = Linear("bse,ed->bsd", (e, d), None, std, name="input_projection")(gate * per_layer_BSE)
            x_BSD = added(x_BSD, y, "post_input_norm")
        if c.layer_scalar:
            x_BSD = Scalar(name="output_scalar")(x_BSD)
        return x_BSD, keys_values


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`x * factor`, rounded once: in bfloat16 a factor such as 0.22 would be rounded first."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def _grown(query_BSHK: jax.Array, positions_BS: jax.Array, rate: float, context: int) -> jax.Array:
    """Queries times `1 + rate log(1 + floor(position / context))`, as in Llama 4."""
    growth_BS = 1 + rate * jnp.log1p((positions_BS // context).astype(jnp.float32))
    return (query_BSHK.astype(jnp.float32) * growth_BS[:, :, None, None]).astype(query_BSHK.dtype)


def rotate(x_BSHK: jax.Array, cos_BSR: jax.Array, sin_BSR: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotates pairs of the first R numbers of each head by R / 2 angles: (i, i + R/2), or interleaved (2i, 2i + 1)."""
    rotary, cos, sin = 2 * cos_BSR.shape[-1], cos_BSR[:, :, None, :], sin_BSR[:, :, None, :]
    x = x_BSHK.astype(jnp.float32)
    x, rest = (x[..., :rotary], [x[..., rotary:]]) if rotary < x.shape[-1] else (x, [])
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
        return jnp.concatenate([turned, *rest], axis=-1).astype(x_BSHK.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*halves, *rest], axis=-1).astype(x_BSHK.dtype)


def rotation(ropes: tuple[Rope, ...], rotary_dim: int, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every RoPE of the model, float32[., B, S, R / 2] each."""
    of_ropes = jnp.asarray(np.stack([frequencies(rope, rotary_dim) for rope in ropes]), jnp.float32)
    angles = positions_BS[None, :, :, None].astype(jnp.float32) * of_ropes[:, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if any(rope.attention_factor != 1.0 for rope in ropes):
        factors = jnp.asarray([rope.attention_factor for rope in ropes], jnp.float32)[:, None, None, None]
        cos, sin = cos * factors, sin * factors
    return cos, sin
