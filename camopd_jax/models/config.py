"""The properties of a decoder-only transformer, read from a Hugging Face `config.json`.

The layers depend only on these properties, never on the name of a model family.
"""

from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import Mesh

from camopd_jax.errors import UserError
from camopd_jax.models import fields as limits
from camopd_jax.models import rope
from camopd_jax.models.config_json import checked_fields, is_multimodal, layer_types, text_config
from camopd_jax.models.family import Family, Fields, NormKind, QKNorm, StackedExperts
from camopd_jax.models.multimodal import MULTIMODAL
from camopd_jax.models.rope import NO_ROTATION, Rope
from camopd_jax.types import ATTENTION, GLOBAL_ATTENTION, SHARING

Activation = Literal["silu", "gelu_tanh", "relu2"]
Implementation = Literal["auto", "xla", "fused"]


@dataclass(frozen=True)
class Routing:
    """The router of a mixture of experts."""

    experts: int
    per_token: int  # experts of a token
    normalized: bool  # whether the weights of a token's experts are divided by their sum
    stacked: StackedExperts | None = None  # if a checkpoint has all experts of a layer in one tensor: how
    # Whether the router normalises and scales its input, and multiplies each expert's weight by a factor of its own
    scaled: bool = False


@dataclass(frozen=True)
class GlobalAttention:
    """The heads of layers without a window, where those of other layers are different."""

    num_kv_heads: int
    head_dim: int
    rope: Rope
    keys_as_values: bool  # `ModelConfig.keys_as_values`


@dataclass(frozen=True)
class PerLayerInput:
    """A second embedding: a vector for each token and layer. With a projection of the first one, it gates what a layer
    adds after its feed-forward.
    """

    size: int  # of a vector
    vocab_size: int  # at least the model's


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and properties of one transformer. Hashable: a static argument of compiled functions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a feed-forward, or of one expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied_head: bool
    activation: Activation
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]  # for each layer, an index in `ropes`
    rotary_dim: int  # how many numbers of a head are rotated: the first ones
    windows: tuple[int | None, ...]  # for each layer, the attention window in positions, the token's own included
    query_scale: float  # factor on q.k
    interleaved_rope: bool = False  # rotated are the pairs (2i, 2i + 1), not (i, i + rotary_dim / 2)
    # (b, n): queries at position p are multiplied by 1 + b log(1 + floor(p / n))
    query_growth: tuple[float, int] | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False  # of the feed-forward, or of router and experts
    routing: Routing | None = None  # of a mixture of experts
    # Width of a feed-forward beside the experts: each has norms of its own before and after it, and both are added
    dense_size: int | None = None
    gated_mlp: bool = True  # whether the feed-forward is down(activation(gate x) * up x), not down(activation(up x))
    parallel: bool = False  # whether attention and feed-forward have the same input, the layer's first norm
    norm: NormKind = "rms"
    norm_bias: bool = False
    qk_norm: QKNorm | None = None
    attention_sinks: bool = False  # whether each head has a trained score, without a value, beside those of the keys
    # Of the layers without a window; the fields about heads and RoPE are then those of the other layers
    global_attention: GlobalAttention | None = None
    # How many of the last layers use keys and values of another one: of the last layer before them with the same window
    sharing_layers: int = 0
    sharing_size: int | None = None  # width of the feed-forward of these layers; None: as of the others
    shares_keys: bool = False  # in `of_attentions`: whether keys and values are those of another layer
    per_layer_input: PerLayerInput | None = None
    keys_as_values: bool = False  # whether values are the keys before their norm and RoPE
    value_norm: bool = False  # whether values are normalised over each head, without weights
    layer_scalar: bool = False  # whether each layer's output is multiplied by a constant of the checkpoint
    # (a, m): the feed-forward is down((up x + 1) * g * sigmoid(a g)), g = gate x, with g <= m and |up x| <= m
    clamped_swiglu: tuple[float, float] | None = None
    pre_norms: bool = True  # whether norms precede attention and feed-forward
    post_norms: bool = False  # whether norms follow attention and feed-forward
    norm_offset: float = 0.0  # added to a norm's weight
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add to the residual stream
    logits_divisor: float = 1.0  # before the final soft cap
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    output_vocab_size: int | None = None  # logits are cut to this; None: vocab_size
    module_names: tuple[tuple[str, str], ...] = ()  # Hugging Face names that differ from `rows.MODULE_NAMES`
    # Of the names of all its tensors, if the checkpoint has other tensors too; `weights` and `names` are without it
    tensor_prefix: str = ""
    replaced_prefix: str = ""  # in place of which they have `tensor_prefix`
    int8: bool = False  # whether the kernels of the layers, but of routers, are int8 (`models.quantised`)
    adapter: tuple[tuple[str, int], ...] = ()  # modules with an adapter (`models.adapters`), and its largest rank

    @property
    def feed_forward_size(self) -> int:
        """The width of the feed-forward that reads every token, alone or beside experts."""
        return self.dense_size or self.intermediate_size

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """The different `windows`, each once."""
        return tuple(dict.fromkeys(self.windows))

    @property
    def layer_window(self) -> tuple[int, ...]:
        """For each layer, an index in `distinct_windows`."""
        return tuple(self.distinct_windows.index(window) for window in self.windows)

    @property
    def first_sharing(self) -> int:
        """The number of the first layer that uses the keys and values of another; as many layers have their own."""
        return self.num_layers - self.sharing_layers

    @property
    def without_sharing(self) -> "ModelConfig":
        """The config of a model in which all layers have their own keys and values, and feed-forwards of one width."""
        return replace(self, sharing_layers=0, sharing_size=None)

    @property
    def layer_attention(self) -> tuple[str, ...]:
        """For each layer, the name of its attention among the parameters."""
        first = self.first_sharing
        different = self.global_attention is not None
        names = [GLOBAL_ATTENTION if different and window is None else ATTENTION for window in self.windows]
        return (*names[:first], *(SHARING[name] for name in names[first:]))

    @property
    def producers(self) -> dict[str, int]:
        """For each attention that uses keys and values of another layer, the number of that layer."""
        return {sharing: self.layers_with(own)[-1] for own, sharing in SHARING.items() if self.layers_with(sharing)}

    @property
    def of_attentions(self) -> dict[str, "ModelConfig"]:
        """The config of a model in which all layers are alike, for each `layer_attention`."""
        if not self.sharing_layers:
            return self._of_windows()
        own = self.without_sharing._of_windows()
        size = self.sharing_size or self.intermediate_size
        sharing = {
            SHARING[name]: replace(of, shares_keys=True, intermediate_size=size)
            for name, of in own.items()
            if self.layers_with(SHARING[name])
        }
        return own | sharing

    def _of_windows(self) -> dict[str, "ModelConfig"]:
        """`of_attentions` without layers that use keys and values of others."""
        if self.global_attention is None:
            return {ATTENTION: self}
        of, alike = self.global_attention, replace(self, layer_rope=(0,) * self.num_layers, global_attention=None)
        window = next((window for window in self.windows if window is not None), None)
        return {
            ATTENTION: replace(alike, windows=(window,) * self.num_layers),
            GLOBAL_ATTENTION: replace(
                alike,
                windows=(None,) * self.num_layers,
                num_kv_heads=of.num_kv_heads,
                head_dim=of.head_dim,
                rotary_dim=of.head_dim,
                ropes=(of.rope,),
                keys_as_values=of.keys_as_values,
            ),
        }

    def layers_with(self, attention: str) -> tuple[int, ...]:
        """The numbers of the layers with this attention."""
        return tuple(i for i, name in enumerate(self.layer_attention) if name == attention)

    @property
    def stack_index(self) -> tuple[int, ...]:
        """For each layer, its index among the layers with the same attention."""
        return tuple(self.layer_attention[:i].count(name) for i, name in enumerate(self.layer_attention))


@dataclass(frozen=True)
class AttentionSpec:
    """The settings of attention that all layers of a model share."""

    windows: tuple[int | None, ...]  # the different windows of the layers; None: no window
    scale: float  # factor on q.k, before `softcap * tanh(scores / softcap)`
    softcap: float | None = None
    # For complete rows. "fused": the platform's kernel; "auto": the kernel if rows are long enough and divide over the
    # mesh; "xla": plain matrix products.
    implementation: Implementation = "xla"
    mesh: Mesh | None = None  # rows and heads are split over it; None: one device
    over_cache: Implementation = "xla"  # for one new token of each row: plain, or "fused": the kernel of `cached`


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def from_hf(config: Fields, *, context: int | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a config.json of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Args:
      context: the longest sequence of the run in tokens. Only "dynamic" RoPE scaling depends on it: the scaling is
        computed once for this length, so that a row's result does not depend on the other rows.
      where: the file's name in error messages.

    Raises:
      UserError: for an unknown architecture, and for an unknown field that may change the output.
    """
    multimodal = MULTIMODAL[config["model_type"]] if is_multimodal(config) else None
    config, where = text_config(config, where)
    fields, family = checked_fields(config, where)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields["head_dim"] or width // heads
    activation = fields[family.activation_field]
    activation = family.activations.get(activation, activation)
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where}: activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    types = layer_types(fields, family, where)
    windows = tuple(fields["sliding_window"] if t == "sliding_attention" else None for t in types)
    blocks = rope.blocks(fields, family)
    if lacking := set(types) - blocks.keys():
        raise UserError(f"{where}: rope_parameters has no block for layers of type {min(lacking)}; add it")
    rotary_dim = rope.rotary_dim(blocks[types[0]], fields, family, head_dim, where)
    rope_of_type = {t: rope.read(block, fields, family, rotary_dim, context, where) for t, block in blocks.items()}
    layer_ropes = [
        rope_of_type[t] if family.rotates(i, window is not None, fields) else NO_ROTATION
        for i, (t, window) in enumerate(zip(types, windows, strict=True))
    ]
    ropes = tuple(dict.fromkeys(layer_ropes))
    bias = fields["attention_bias"]
    routing, expert_size = _routing(fields, family, where), fields.get("moe_intermediate_size")
    model = ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=width,
        intermediate_size=expert_size if routing and expert_size else fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"] or heads,
        head_dim=head_dim,
        norm_eps=fields[family.eps_field],
        tied_head=fields["tie_word_embeddings"],
        activation=_ACTIVATIONS[activation],
        ropes=ropes,
        layer_rope=tuple(map(ropes.index, layer_ropes)),
        rotary_dim=rotary_dim,
        windows=windows,
        query_scale=1.0 if family.global_attention else _query_scale(fields, head_dim),
        interleaved_rope=family.interleaved_rope,
        query_growth=rope.query_growth(blocks[types[0]], fields, family, where),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=fields.get("attention_out_bias", bias) if family.output_bias is None else family.output_bias,
        mlp_bias=fields["mlp_bias"],
        routing=routing,
        dense_size=fields["intermediate_size"] if routing and family.dense_beside_experts else None,
        gated_mlp=family.gated_mlp,
        parallel=family.parallel,
        norm=family.norm,
        norm_bias=family.norm_bias,
        qk_norm=family.qk_norm,
        attention_sinks=family.attention_sinks,
        value_norm=family.value_norm,
        layer_scalar=family.layer_scalar,
        clamped_swiglu=(fields["swiglu_alpha"], fields["swiglu_limit"]) if "swiglu_limit" in fields else None,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        norm_offset=family.norm_offset,
        embed_scale=width**0.5 if family.scales_embedding else fields.get("embedding_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0),
        logits_divisor=fields.get("logits_scaling", 1.0) / fields.get("logit_scale", 1.0),
        attention_softcap=fields.get("attn_logit_softcapping"),
        final_softcap=fields.get("final_logit_softcapping"),
        initializer_range=fields["initializer_range"],
        module_names=tuple(family.module_names.items()),
        tensor_prefix=multimodal.prefix if multimodal else "",
        replaced_prefix=multimodal.replaces if multimodal else "",
    )
    if not family.global_attention:
        return model
    return _with_sharing(_with_global_attention(model, types, rope_of_type, fields, where), fields, where)


def _query_scale(fields: Fields, head_dim: int) -> float:
    """The factor on q.k."""
    return float(fields.get("attention_multiplier", fields.get("query_pre_attn_scalar", head_dim) ** -0.5))


def _with_global_attention(
    model: ModelConfig, types: list[str], rope_of_type: dict[str, Rope], fields: Fields, where: str
) -> ModelConfig:
    """A config whose layers without a window have the heads of `global_head_dim` and `num_global_key_value_heads`."""
    full, sliding = "full_attention", "sliding_attention"
    types = [*types[:-1], full]  # as transformers reads it
    head_dim, kv_heads = _global_heads(fields, types, where)
    kv_heads = kv_heads or model.num_kv_heads
    if head_dim % 2:
        raise UserError(f"{where}: field global_head_dim is {head_dim}; RoPE needs an even number")
    if model.num_heads % kv_heads:
        raise UserError(
            f"{where}: num_global_key_value_heads is {kv_heads}, which does not divide num_attention_heads = "
            f"{model.num_heads}"
        )
    of = GlobalAttention(kv_heads, head_dim, rope_of_type[full], fields["attention_k_eq_v"])
    ropes = (rope_of_type.get(sliding, of.rope),)
    windows = (*model.windows[:-1], None)
    model = replace(model, global_attention=of, windows=windows, layer_rope=(0,) * len(types), ropes=ropes)
    return model if sliding in types else model.of_attentions[GLOBAL_ATTENTION]


def _with_sharing(model: ModelConfig, fields: Fields, where: str) -> ModelConfig:
    """A config with a second embedding, and with layers that use the keys and values of others."""
    size, vocabulary = fields["hidden_size_per_layer_input"], fields["vocab_size_per_layer_input"]
    if size and vocabulary < model.vocab_size:
        raise UserError(
            f"{where}: vocab_size_per_layer_input is {vocabulary}, less than vocab_size = {model.vocab_size}; every "
            "token needs an embedding"
        )
    per_layer = PerLayerInput(size, vocabulary) if size else None
    count, wide = fields["num_kv_shared_layers"], fields["use_double_wide_mlp"]
    model = replace(model, per_layer_input=per_layer, sharing_layers=count)
    if not count:
        return model
    first = model.first_sharing
    if first <= 0 or set(model.windows[:first]) != set(model.windows):
        raise UserError(
            f"{where}: num_kv_shared_layers is {count} of {model.num_layers} layers; before these layers there must be "
            "one of each of their layer_types, whose keys and values they use"
        )
    if wide and model.routing is not None:
        raise UserError(f"{where}: field use_double_wide_mlp is true; with experts only false is supported")
    return replace(model, sharing_size=2 * model.intermediate_size if wide else None)


def _global_heads(fields: Fields, types: list[str], where: str) -> tuple[int, int | None]:
    """Width and number of key and value heads of layers without a window; None: as in other layers.

    transformers saves them as `per_layer_config`, one object for each of these layers; published files have their own
    fields.
    """
    blocks = fields["per_layer_config"]
    if blocks is None:
        kv_heads = fields["num_global_key_value_heads"]
        return fields["global_head_dim"], kv_heads if fields["attention_k_eq_v"] else None
    full = {str(i) for i, name in enumerate(types) if name == "full_attention"}
    alike = len({tuple(sorted(block.items())) for block in blocks.values()}) == 1
    first: Fields = next(iter(blocks.values()), {})
    if set(blocks) != full or not alike or not {"head_dim"} <= first.keys() <= {"head_dim", "num_key_value_heads"}:
        raise UserError(
            f"{where}: per_layer_config must have the same head_dim and num_key_value_heads for every layer of type "
            f"full_attention ({', '.join(sorted(full, key=int))}), and no other layer"
        )
    for name, value in first.items():
        limits.COUNT.check(value, name, f"{where}: per_layer_config")
    return first["head_dim"], first.get("num_key_value_heads")


def _routing(fields: Fields, family: Family, where: str) -> Routing | None:
    """The router of a mixture of experts; None for other families."""
    if family.experts_field is None:
        return None
    experts, per_token, flag = fields[family.experts_field], fields[family.per_token_field], family.experts_flag
    if flag is not None and not fields[flag]:
        if experts:
            raise UserError(f"{where}: field {family.experts_field} = {experts!r} needs {flag} = true")
        return None
    if flag is not None:
        for field in (family.experts_field, family.per_token_field, "moe_intermediate_size"):
            limits.COUNT.check(fields[field], field, where)
    if per_token > experts:
        raise UserError(f"{where}: {family.per_token_field} is {per_token}; {family.experts_field} is only {experts}")
    normalized = fields.get("norm_topk_prob", True)
    return Routing(experts, per_token, normalized, family.stacked_experts, family.scaled_router)
