"""The decoder-only transformer, and `Model`: the face of it that the compiled steps see."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.errors import UserError
from camopd_jax.models import fused
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.layers import Attention, FeedForward, RMSNorm, rotation
from camopd_jax.models.stack import Layer, through
from camopd_jax.models.weights import layer_by_layer, table
from camopd_jax.runtime.mesh import ACTIVATION, RESIDUAL, constrain, constrain_even
from camopd_jax.types import EMPTY, KVCache, Params, Residuals

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None, "rollout": None}


class Block(nn.Module):
    """One layer.

    `shared` is the same for all layers. Of it, `key_positions` None says that rows attend to themselves. `layer` is
    this layer's own: which RoPE and which window (None: there is one alone), and its cache: keys and values, () for
    one that begins with these tokens, None for none.
    """

    config: ModelConfig
    mesh: Mesh | None
    form: str

    @nn.compact
    def __call__(self, x_BSD: jax.Array, shared: dict[str, Any], layer: dict[str, Any]):
        """The layer's output, and its cache with the new keys and values; None without a cache."""
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        def whole(x: jax.Array) -> jax.Array:
            return constrain(x, self.mesh, *ACTIVATION)

        def split(x: jax.Array) -> jax.Array:
            return constrain_even(x, self.mesh, *RESIDUAL)

        attention = Attention(c, self.mesh, self.form, name="attention")
        y, cache = attention(whole(norm("attention_norm", x_BSD)), shared, layer)
        y = split(y)
        x_BSD = split(x_BSD + (norm("post_attention_norm", y) if c.post_norms else y))
        y = split(FeedForward(c, self.mesh, name="mlp")(whole(norm("mlp_norm", x_BSD))))
        return split(x_BSD + (norm("post_mlp_norm", y) if c.post_norms else y)), cache


@functools.cache
def _layer(config: ModelConfig, mesh: Mesh | None, form: str, remat: str) -> Layer:
    """`Block` as a function, the same object for the same arguments: a static argument of `through`."""
    block = Block(config, mesh, form, parent=None)

    def layer(params: Params, x: jax.Array, shared: dict[str, Any], own: dict[str, Any]) -> jax.Array:
        return block.apply({"params": params}, x, shared, own)[0]

    return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm, head."""

    config: ModelConfig
    mesh: Mesh | None
    dtype: jnp.dtype
    remat: str
    form: str  # of attention over whole rows

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.embedding = self.param("embedding", normal, (c.vocab_size, c.hidden_size))
        if not c.tied_head:
            self.param("head", normal, (c.hidden_size, c.vocab_size))
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset)

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Hidden states `[B, S, D]`, through scanned layers: one layer is compiled, whatever the depth."""
        c = self.config
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.num_layers,
        )
        x, _ = scanned(c, self.mesh, self.form, name="layers")(
            self.embed(tokens_BS), self.shared(positions_BS, None), self.own()
        )
        return self.final_norm(x)

    def accumulate(
        self, stack: Params, so_far: Params, tokens_BS: jax.Array, positions_BS: jax.Array, residuals: Residuals
    ) -> jax.Array:
        """The same, differentiable by `so_far` in the place of the layers' parameters (`stack.through`)."""
        layer = _layer(self.config, self.mesh, self.form, self.remat)
        x, shared = self.embed(tokens_BS), self.shared(positions_BS, None)
        known = jnp.stack([constrain_even(r, self.mesh, *RESIDUAL) for r in residuals]) if residuals else None
        return self.final_norm(through(layer, stack, so_far, x, shared, self.own(), known))

    def own(self) -> dict[str, Any]:
        """What each layer has of its own, [L] each."""
        c = self.config
        layers = {"rope": jnp.asarray(c.layer_rope, jnp.int32), "window": None, "cache": None}
        if len(c.window_kinds) > 1:
            layers["window"] = jnp.asarray([c.window_kinds.index(w) for w in c.windows], jnp.int32)
        return layers

    def extend(
        self,
        layers: Sequence[Params],
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        key_positions_BS: jax.Array,
        cache: KVCache | None,
        slot: jax.Array | int,
        keep_residuals: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states of tokens that join a cache at `slot`, or make one: then slot i is position i, and
        `keep_residuals` says what later tokens follow.

        Layer by layer, each with parameters of its own: a scan would copy every layer's weights and cache
        out of their stacks, at every token of an answer.
        """
        c = self.config
        if cache is None:
            key_positions, shared = key_positions_BS, self.shared(positions_BS, None)
        else:
            key_positions = jax.lax.dynamic_update_slice(cache.positions, key_positions_BS, (0, slot))
            shared = self.shared(positions_BS, key_positions) | {"slot": slot}
        x, kv = self.embed(tokens_BS), []
        stream = [x]
        for i, params in enumerate(layers):
            layer = {"rope": c.layer_rope[i], "window": c.window_kinds.index(c.windows[i]),
                     "cache": () if cache is None else (cache.keys[i], cache.values[i])}  # fmt: skip
            x, new = Block(c, self.mesh, self.form, parent=None).apply({"params": params}, x, shared, layer)
            kv.append(new)
            stream.append(x)
        keys, values = zip(*kv, strict=True)
        residuals = tuple(stream) if keep_residuals else ()
        if cache is not None:
            residuals = tuple(
                jax.lax.dynamic_update_slice(kept, new, (0, slot, 0))
                for kept, new in zip(cache.residuals, stream, strict=False)  # a cache keeps all of it, or nothing
            )
        return self.final_norm(x), KVCache(keys, values, key_positions, residuals)

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        x = jnp.take(self.embedding, tokens_BS, axis=0).astype(self.dtype)
        if self.config.embed_scale != 1.0:
            x *= jnp.asarray(self.config.embed_scale, self.dtype)
        return constrain_even(x, self.mesh, *RESIDUAL)

    def shared(self, positions_BS: jax.Array, key_positions_BS: jax.Array | None) -> dict[str, Any]:
        """What is the same for all layers."""
        return {
            "positions": positions_BS,
            "key_positions": key_positions_BS,
            "rotation": rotation(self.config.ropes, self.config.head_dim, positions_BS),
        }


@dataclass(frozen=True)
class Model:
    """A transformer on a mesh, at a precision: implements `types.LanguageModel`."""

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: str = "float32"  # of activations and matrix products
    remat: str = "block"  # what the backward pass computes again: `config.Compute.remat`
    attention: str = "auto"  # "auto", "xla" or "fused": how whole rows attend; over a cache and without a mesh plainly

    def __post_init__(self) -> None:
        """Raises UserError where a fused kernel is asked for and there is none."""
        if self.attention != "fused" or self.mesh is None:
            return
        if why := fused.obstacle(self.config, self.mesh, self.dtype):
            raise UserError(f"config.compute.attention is 'fused'; {why}; give auto or xla")

    @property
    def _decoder(self) -> Decoder:
        form = "xla" if fused.obstacle(self.config, self.mesh, self.dtype) else self.attention
        return Decoder(self.config, self.mesh, jnp.dtype(self.dtype), self.remat, form)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self._decoder.init(key, tokens, tokens)["params"]

    def on(self, mesh: Mesh | None) -> "Model":
        return dataclasses.replace(self, mesh=mesh)

    def hidden(
        self, params: Params, tokens_BS: jax.Array, so_far: Params | None = None, residuals: Residuals = ()
    ) -> jax.Array:
        positions = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None, :]
        if so_far is None:
            hidden = self._decoder.apply({"params": params}, tokens_BS, positions)
        else:
            others = {name: p for name, p in params.items() if name != "layers"}
            hidden = self._decoder.apply(
                {"params": others}, params["layers"], so_far, tokens_BS, positions, residuals, method=Decoder.accumulate
            )
        return constrain(hidden, self.mesh, *ACTIVATION)

    def for_decoding(self, params: Params) -> Params:
        others = {name: p for name, p in params.items() if name != "layers"}
        layers = (self.layer_for_decoding(params["layers"], i) for i in range(self.config.num_layers))
        return self.others_for_decoding(others) | {"layers": tuple(layers)}

    def layer_for_decoding(self, layers: Params, i: jax.Array | int) -> Params:
        return self.others_for_decoding(
            jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), layers)
        )

    def others_for_decoding(self, others: Params) -> Params:
        def cast(path, p: jax.Array) -> jax.Array:
            return p if path[-1].key == "scale" else p.astype(self.dtype)  # norms stay as they are: they act in float32

        return jax.tree_util.tree_map_with_path(cast, others)

    @property
    def decoding_places(self) -> Params | None:
        return None if self.mesh is None else layer_by_layer(self.config, self.mesh)

    def prefill(
        self, params: Params, tokens_BP: jax.Array, lengths_B: jax.Array, keep_residuals: bool = False
    ) -> tuple[jax.Array, KVCache]:
        slots = jnp.broadcast_to(jnp.arange(tokens_BP.shape[1], dtype=jnp.int32), tokens_BP.shape)
        seen = jnp.where(slots < lengths_B[:, None], slots, EMPTY)
        hidden, cache = self._extend(params, tokens_BP, slots, seen, None, 0, keep_residuals)

        hidden = constrain(hidden, self.mesh, *ACTIVATION)

        def place(array: jax.Array) -> jax.Array:
            return constrain(array, self.mesh, "batch", "kv_heads", "sequence", "head_dim")

        return hidden, cache.replace(keys=tuple(map(place, cache.keys)), values=tuple(map(place, cache.values)))

    def decode(
        self, params: Params, token_B: jax.Array, position_B: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        position_B1 = position_B[:, None]
        hidden, cache = self._extend(params, token_B[:, None], position_B1, position_B1, cache, slot)
        return hidden[:, 0], cache

    def _extend(self, params: Params, *args) -> tuple[jax.Array, KVCache]:
        others = {name: p for name, p in params.items() if name != "layers"}
        return self._decoder.apply({"params": others}, params["layers"], *args, method=Decoder.extend)

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
        logits = jnp.einsum(equation, hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits if c.final_softcap is None else c.final_softcap * jnp.tanh(logits / c.final_softcap)
