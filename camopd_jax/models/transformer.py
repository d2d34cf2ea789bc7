"""The decoder-only transformer: `Model` implements the methods that the compiled steps use."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.models import adapters, cached, fused
from camopd_jax.models.config import Implementation, ModelConfig
from camopd_jax.models.layers import (
    Block,
    LayerCache,
    LayerKind,
    Linear,
    Norm,
    Positions,
    normalized,
    rotation,
    scaled,
)
from camopd_jax.models.products import multiply, multiply_to_float32
from camopd_jax.models.segments import place, segments
from camopd_jax.models.stack import run_layers
from camopd_jax.models.weights import KERNEL_SCALE, LORA_SCALE, decoding_shardings, layer_tree, table
from camopd_jax.runtime.mesh import ACTIVATION, RESIDUAL, constrain, constrain_even
from camopd_jax.types import ATTENTION, EMPTY, MLP, SHARING, WIDE_MLP, KVCache, Params, Residuals


@dataclass(frozen=True)
class Model:
    """A transformer on a mesh with a compute dtype; implements `types.LanguageModel`.

    Complete rows use one scan over the layers (`stack.run_layers`). Prefill and decoding use a Python loop over the
    layers, with unstacked parameters and caches: a scan would copy every layer's weights and cache from the stacked
    arrays for every token. Both call the same `Block`.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: str = "float32"  # of activations and matrix products
    remat: str = "block"  # what the backward pass recomputes: `config.Compute.remat`
    attention: Implementation = "auto"  # for complete rows; it is always plain without a mesh
    decode_attention: Implementation = "xla"  # over a cache

    def __post_init__(self) -> None:
        """Raises UserError if attention is "fused" and no fused kernel supports the model."""
        if self.attention == "fused" and self.mesh is not None:
            for config in self.config.of_attentions.values():
                fused.check(config, self.mesh, self.dtype)
        if self.decode_attention == "fused" and self.mesh is not None:
            for config in self.config.of_attentions.values():
                cached.check(config, self.mesh, self.dtype)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters. An adapter changes nothing yet: its matrices B are zero."""
        by_name = {name: _Parameters(c).init(key)["params"] for name, c in self.config.of_attentions.items()}
        params = by_name[ATTENTION]
        if len(by_name) > 1:
            stacks = {
                name: jax.tree.map(lambda p, name=name: p[: len(self.config.layers_with(name))], p["layers"][ATTENTION])
                for name, p in by_name.items()
            }
            if self.config.sharing_size is not None:
                first, of_using = self.config.first_sharing, by_name[self.layer_attention[-1]]["layers"]
                stacks[MLP] = jax.tree.map(lambda p: p[:first], params["layers"][MLP])
                stacks[WIDE_MLP] = jax.tree.map(lambda p: p[first:], of_using[MLP])
            params = params | {"layers": params["layers"] | stacks}
        return adapters.attach(params, adapters.init(self.config, key))

    def on(self, mesh: Mesh | None) -> "Model":
        return dataclasses.replace(self, mesh=mesh)

    # ------------------------------------------------------------------------------ complete rows

    def hidden(
        self, params: Params, tokens_BS: jax.Array, so_far: Params | None = None, residuals: Residuals = ()
    ) -> jax.Array:
        positions = self._positions(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None, :])
        residuals = tuple(constrain_even(array, self.mesh, *RESIDUAL) for array in residuals)
        x = self._embed(params, tokens_BS)
        per_layer = self._per_layer_inputs(params, tokens_BS, x)
        parts = segments(self.config, self._blocks(), self.remat, params["layers"])
        x = run_layers(parts, params["layers"], x, positions, so_far, residuals, per_layer)
        return constrain(self._final_norm(params, x), self.mesh, *ACTIVATION)

    def _blocks(self) -> dict[str, Block]:
        """By the name of the attention."""
        return {name: self._block(name) for name in self.config.of_attentions}

    def _block(self, attention: str) -> Block:
        config = self.config.of_attentions[attention]
        plain = fused.unsupported_reason(config, self.mesh, self.dtype) is not None
        return Block(config, self.mesh, "xla" if plain else self.attention, self.decode_attention)

    def _positions(self, positions_BS: jax.Array) -> Positions:
        c = self.config
        own = [of for of in c.of_attentions.values() if not of.shares_keys]
        return Positions(positions_BS, *(rotation(of.ropes, of.rotary_dim, positions_BS) for of in own))

    def _embed(self, params: Params, tokens_BS: jax.Array) -> jax.Array:
        x = jnp.take(params["embedding"], tokens_BS, axis=0).astype(self.dtype)
        if self.config.embed_scale != 1.0:
            x *= jnp.asarray(self.config.embed_scale, self.dtype)  # rounded first, as Gemma's is
        return constrain_even(x, self.mesh, *RESIDUAL)

    def _per_layer_inputs(self, params: Params, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array | None:
        """`LayerInputs.per_layer` of all layers, [L, B, S, E]: of the tokens, and projected from their embeddings."""
        c, of = self.config, self.config.per_layer_input
        if of is None:
            return None
        tokens = jnp.take(params["per_layer_embedding"], tokens_BS, axis=0).astype(self.dtype)
        tokens *= jnp.asarray(of.size**0.5, self.dtype)  # rounded first, as in `_embed`
        kernel = params["per_layer_projection"]["kernel"].astype(self.dtype)
        projected = scaled(multiply("bsd,dn->bsn", x_BSD, kernel), c.hidden_size**-0.5)
        shape = (*tokens_BS.shape, c.num_layers, of.size)
        projected = normalized(projected.reshape(shape), params["per_layer_norm"], c)
        both = scaled(projected + tokens.reshape(shape), 2**-0.5)
        return constrain_even(jnp.moveaxis(both, 2, 0), self.mesh, None, *RESIDUAL)

    def _final_norm(self, params: Params, x_BSD: jax.Array) -> jax.Array:
        return normalized(x_BSD, params["final_norm"], self.config)

    # ------------------------------------------------------------------------------ prefill and decoding

    def for_decoding(self, params: Params) -> Params:
        others = {name: p for name, p in params.items() if name != "layers"}
        layers = (self.layer_for_decoding(params["layers"], i, name) for i, name in enumerate(self.layer_attention))
        return self.others_for_decoding(others) | {"layers": tuple(layers)}

    @property
    def layer_attention(self) -> tuple[str, ...]:
        return self.config.layer_attention

    def layer_for_decoding(self, layers: Params, i: jax.Array | int, attention: str = ATTENTION) -> Params:
        def entry(p: jax.Array, i: jax.Array | int = i) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(p, i, keepdims=False)

        own = layer_tree(layers, attention)
        if len(self.config.of_attentions) == 1:
            layer = jax.tree.map(entry, own)
        else:
            index = dict.fromkeys(own, i) | {ATTENTION: jnp.asarray(self.config.stack_index, jnp.int32)[i]}
            if WIDE_MLP in layers and attention in SHARING.values():
                index[MLP] = i - self.config.first_sharing
            layer = {name: jax.tree.map(partial(entry, i=index[name]), own[name]) for name in own}
        return self.others_for_decoding(layer if self.config.int8 else adapters.merge_layer(layer))

    def others_for_decoding(self, others: Params) -> Params:
        def cast(path: tuple[jax.tree_util.DictKey, ...], p: jax.Array) -> jax.Array:
            kept = path[-1].key in ("scale", "shift", LORA_SCALE, KERNEL_SCALE)  # computed in float32
            return p if kept or p.dtype == jnp.int8 else p.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(cast, others)

    @property
    def decoding_shardings(self) -> Params | None:
        return None if self.mesh is None else decoding_shardings(self.config, self.mesh)

    def prefill(
        self, params: Params, tokens_BP: jax.Array, lengths_B: jax.Array, keep_residuals: bool = False
    ) -> tuple[jax.Array, KVCache]:
        slots = jnp.broadcast_to(jnp.arange(tokens_BP.shape[1], dtype=jnp.int32), tokens_BP.shape)
        hidden, residuals, keys, values = self._layer_by_layer(params, tokens_BP, slots)

        def place(array: jax.Array) -> jax.Array:
            return constrain(array, self.mesh, "batch", "kv_heads", "sequence", "head_dim")

        cache = KVCache(
            keys=tuple(map(place, keys)),
            values=tuple(map(place, values)),
            positions=jnp.where(slots < lengths_B[:, None], slots, EMPTY),
            residuals=residuals if keep_residuals else (),
        )
        return constrain(hidden, self.mesh, *ACTIVATION), cache

    def decode(
        self, params: Params, token_B: jax.Array, position_B: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        position_B1 = position_B[:, None]
        positions = jax.lax.dynamic_update_slice(cache.positions, position_B1, (0, slot))
        caches = [
            LayerCache(keys, values, positions, slot) for keys, values in zip(cache.keys, cache.values, strict=True)
        ]
        hidden, stream, keys, values = self._layer_by_layer(params, token_B[:, None], position_B1, caches)
        residuals = tuple(
            jax.lax.dynamic_update_slice(kept, new, (0, slot, 0))
            for kept, new in zip(cache.residuals, stream, strict=False)  # cache.residuals may be empty
        )
        return hidden[:, 0], KVCache(keys, values, positions, residuals)

    def _layer_by_layer(
        self,
        params: Params,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        caches: Sequence[LayerCache] | None = None,
    ) -> tuple[jax.Array, Residuals, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Hidden states `[B, S, D]`, the residual stream, and keys and values of each layer that has its own."""
        c, blocks, producers = self.config, self._blocks(), self.config.producers
        positions = self._positions(positions_BS)
        x = self._embed(params, tokens_BS)
        per_layer = self._per_layer_inputs(params, tokens_BS, x)
        stream, keys_values = [x], list[Any]()
        for i, (layer, name) in enumerate(zip(params["layers"], c.layer_attention, strict=True)):
            at = place(c, name, positions, LayerKind(c.layer_rope[i], c.layer_window[i]))
            cache = caches and caches[producers.get(name, i)]  # layers with keys and values of their own come first
            shared = keys_values[producers[name]] if name in producers else None
            gate = None if per_layer is None else per_layer[i]
            x, new = blocks[name].apply({"params": layer}, x, *at, cache, gate, shared)
            stream.append(x)
            if shared is None:
                keys_values.append(new)
        keys, values = zip(*keys_values, strict=True)
        return self._final_norm(params, x), tuple(stream), keys, values

    # ------------------------------------------------------------------------------ the head

    @property
    def head_axes(self) -> dict[str, tuple[str | None, ...]]:
        name = "embedding" if self.config.tied_head else "head"
        return {row.path[0]: row.axes for row in table(self.config) if row.path == (name,)}

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        c = self.config
        vocab = c.output_vocab_size or c.vocab_size
        if c.tied_head:
            kernel, equation = params["embedding"][:vocab], "...d,vd->...v"
        else:
            kernel, equation = params["head"][:, :vocab], "...d,dv->...v"
        logits = multiply_to_float32(equation, hidden, kernel.astype(self.dtype))
        if c.logits_divisor != 1.0:
            logits /= c.logits_divisor
        return logits if c.final_softcap is None else c.final_softcap * jnp.tanh(logits / c.final_softcap)


class _Parameters(nn.Module):
    """Initialises the parameters; `nn.scan` gives each layer its own random key."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.param("embedding", normal, (c.vocab_size, c.hidden_size))
        if not c.tied_head:
            self.param("head", normal, (c.hidden_size, c.vocab_size))
        gate = shared = None
        if (of := c.per_layer_input) is not None:
            self.param("per_layer_embedding", normal, (of.vocab_size, c.num_layers * of.size))
            Linear(
                "bsd,dn->bsn",
                (c.hidden_size, c.num_layers * of.size),
                None,
                c.initializer_range,
                name="per_layer_projection",
            )(jnp.zeros((1, 1, c.hidden_size)))
            Norm(c, name="per_layer_norm")(jnp.zeros((1, 1, of.size)))
            gate = jnp.zeros((1, 1, of.size))
        if c.shares_keys:
            shared = (jnp.zeros((1, c.num_kv_heads, 1, c.head_dim)),) * 2
        position = jnp.zeros((1, 1), jnp.int32)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        x = jnp.zeros((1, 1, c.hidden_size))
        positions = Positions(position, rotation(c.ropes, c.rotary_dim, position))
        x, _ = stack(c, name="layers")(x, positions, LayerKind(0, 0), None, gate, shared)
        Norm(c, name="final_norm")(x)
