"""What the row of a model family states: `families.FAMILIES` has the rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fields = Mapping[str, Any]  # of a config.json
NormKind = Literal["rms", "layer"]  # with the root mean square, or with mean and standard deviation
QKNorm = Literal["head", "projection"]  # queries and keys are normalised over each head, or over all heads together
# How one tensor has gate and up of all experts: their columns in turn, or as halves of [outputs, inputs] matrices
StackedExperts = Literal["columns", "halves"]


@dataclass(frozen=True)
class Family:
    """The properties of a model family that its config.json does not have."""

    defaults: Fields  # the defaults of transformers; a field of config.json without a default is refused
    # Whether layer i has an attention window, if config.json has no layer_types
    slides: Callable[[int, Fields], bool] = lambda i, fields: False
    # Whether layer i has RoPE; the second argument is whether it has an attention window
    rotates: Callable[[int, bool, Fields], bool] = lambda i, windowed, fields: True
    rope_fields: frozenset[str] = frozenset()  # fields of a RoPE that only some families have
    interleaved_rope: bool = False  # rotated are the pairs (2i, 2i + 1), not (i, i + K / 2)
    activation_field: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)  # other names of activations, and what they mean here
    experts_field: str | None = None  # field with the number of experts, in mixtures of experts
    experts_flag: str | None = None  # field that says whether a model has experts; None: all of the family have them
    per_token_field: str = "num_experts_per_tok"  # field with the number of experts of a token
    stacked_experts: StackedExperts | None = None  # `config.Routing.stacked`
    scaled_router: bool = False  # `config.Routing.scaled`
    dense_beside_experts: bool = False  # `config.ModelConfig.dense_size`
    gated_mlp: bool = True  # whether the feed-forward has a gate
    parallel: bool = False  # whether attention and feed-forward have the same input
    qkv_bias: bool | None = None  # None: the value of attention_bias
    output_bias: bool | None = None  # of the attention's output projection; None: the value of attention_bias
    qk_norm: QKNorm | None = None
    attention_sinks: bool = False  # `config.ModelConfig.attention_sinks`
    global_attention: bool = False  # whether layers without a window have heads of their own, `config.GlobalAttention`
    value_norm: bool = False  # whether values are normalised over each head
    layer_scalar: bool = False  # `config.ModelConfig.layer_scalar`
    norm: NormKind = "rms"
    norm_bias: bool = False
    eps_field: str = "rms_norm_eps"
    pre_norms: bool = True  # whether norms precede attention and feed-forward
    post_norms: bool = False  # whether norms follow attention and feed-forward
    norm_offset: float = 0.0  # added to a norm's weight
    scales_embedding: bool = False  # whether embeddings are multiplied by the square root of the model width
    local_rope_field: str | None = None  # field with the RoPE base of layers with a window, if it is different
    renamed: Mapping[str, str] = field(default_factory=dict)  # `attribute_map` of transformers: other names of fields
    fixed: Fields = field(default_factory=dict)  # fields that transformers ignores, with the values that are supported
    # Class in the `auto_map` of checkpoints that are older than the family in transformers: code that is not needed
    published_code: str | None = None
    # Hugging Face names of modules that differ from `rows.MODULE_NAMES`, and complete names of single parameters
    # (module.leaf). Those with the same name are parts of one tensor, in the order of the table.
    module_names: Mapping[str, str] = field(default_factory=dict)
