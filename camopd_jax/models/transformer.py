"""The decoder-only transformer, and `Model`: the face of it that the compiled steps see."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.models.config import ModelConfig
from camopd_jax.models.layers import Attention, FeedForward, RMSNorm, rotation
from camopd_jax.sharding import ACTIVATION, constrain
from camopd_jax.types import EMPTY, KVCache, Params

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None}


class Block(nn.Module):
    """One layer. `shared` is the same for all layers, `layer` is this layer's own (see `Decoder`)."""

    config: ModelConfig
    mesh: Mesh | None
    keep_kv: bool

    @nn.compact
    def __call__(self, x_BSD: jax.Array, shared: dict[str, Any], layer: dict[str, Any]):
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        y, kv = Attention(c, self.mesh, name="attention")(norm("attention_norm", x_BSD), shared, layer)
        x_BSD = x_BSD + (norm("post_attention_norm", y) if c.post_norms else y)
        y = FeedForward(c, self.mesh, name="mlp")(norm("mlp_norm", x_BSD))
        x_BSD = x_BSD + (norm("post_mlp_norm", y) if c.post_norms else y)
        return constrain(x_BSD, self.mesh, *ACTIVATION), kv if self.keep_kv else None


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm, head."""

    config: ModelConfig
    mesh: Mesh | None
    dtype: jnp.dtype
    remat: str

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.embedding = self.param("embedding", normal, (c.vocab_size, c.hidden_size))
        if not c.tied_head:
            self.head = self.param("head", normal, (c.hidden_size, c.vocab_size))
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset)

    @nn.compact
    def __call__(
        self, tokens_BS: jax.Array, positions_BS: jax.Array, cache: KVCache | None = None, keep_kv: bool = False
    ):
        """Hidden states `[B, S, D]`, and with `keep_kv` the new keys and values `[L, B, S, G, K]`."""
        c = self.config
        x = jnp.take(self.embedding, tokens_BS, axis=0).astype(self.dtype)
        if c.embed_scale != 1.0:
            x *= jnp.asarray(c.embed_scale, self.dtype)
        x = constrain(x, self.mesh, *ACTIVATION)
        shared = {
            "positions": positions_BS,
            "rotation": rotation(c.ropes, c.head_dim, positions_BS),
            "cache_positions": () if cache is None else (cache.positions,),
        }
        windows = None
        if any(w is not None for w in c.windows):
            windows = jnp.asarray([EMPTY if w is None else w for w in c.windows], jnp.int32)
        layers = {
            "rope": jnp.asarray(c.layer_rope, jnp.int32),
            "window": windows,
            "cache": () if cache is None else (cache.keys, cache.values),
        }
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.num_layers,
        )
        x, kv = scanned(c, self.mesh, keep_kv, name="layers")(x, shared, layers)
        return self.final_norm(x), kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        vocab = c.output_vocab_size or c.vocab_size
        if c.tied_head:
            kernel, equation = self.embedding[:vocab], "...d,vd->...v"
        else:
            kernel, equation = self.head[:, :vocab], "...d,dv->...v"
        logits = jnp.einsum(equation, hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits if c.final_softcap is None else c.final_softcap * jnp.tanh(logits / c.final_softcap)


@dataclass(frozen=True)
class Model:
    """A transformer on a mesh, at a precision: implements `types.LanguageModel`."""

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: str = "float32"  # of activations and matrix products
    remat: str = "block"  # "none", "dots" or "block": what the backward pass computes again

    @property
    def _decoder(self) -> Decoder:
        return Decoder(self.config, self.mesh, jnp.dtype(self.dtype), self.remat)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self._decoder.init(key, tokens, tokens)["params"]

    def hidden(self, params: Params, tokens_BS: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None, :]
        return self._decoder.apply({"params": params}, tokens_BS, positions)[0]

    def prefill(self, params: Params, tokens_BP: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, KVCache]:
        slots = jnp.arange(tokens_BP.shape[1], dtype=jnp.int32)[None, :]
        hidden, (keys, values) = self._decoder.apply({"params": params}, tokens_BP, slots, keep_kv=True)
        return hidden, KVCache(keys, values, jnp.where(slots < lengths_B[:, None], slots, EMPTY))

    def decode(
        self, params: Params, token_B: jax.Array, position_B: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        hidden, (keys, values) = self._decoder.apply(
            {"params": params}, token_B[:, None], position_B[:, None], cache, keep_kv=True
        )
        # The layers only read the cache; all of them are written here at once, in place.
        zero = jnp.zeros_like(slot)
        place = (zero, zero, slot, zero, zero)
        return hidden[:, 0], KVCache(
            jax.lax.dynamic_update_slice(cache.keys, keys, place),
            jax.lax.dynamic_update_slice(cache.values, values, place),
            jax.lax.dynamic_update_slice(cache.positions, position_B[:, None], (zero, slot)),
        )

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        return self._decoder.apply({"params": params}, hidden, method=Decoder.logits)
