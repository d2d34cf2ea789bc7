"""The supported model families, one row each.

A row has the information that is not in `config.json`: the defaults of transformers for missing fields, and the fixed
properties of the architecture. `config.from_hf` combines a row and a `config.json` into a `ModelConfig`; no other
module depends on families.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Fields = Mapping[str, Any]  # of a config.json
QKNorm = Literal["head", "projection"]  # queries and keys are normalised over each head, or over all heads together


@dataclass(frozen=True)
class Family:
    """The properties of a model family that its config.json does not have."""

    defaults: Fields  # the defaults of transformers; a field of config.json without a default is refused
    # Whether layer i has an attention window, if config.json has no layer_types
    slides: Callable[[int, Fields], bool] = lambda i, fields: False
    activation_field: str = "hidden_act"
    qkv_bias: bool | None = None  # None: the value of attention_bias
    output_bias: bool | None = None  # of the attention's output projection; None: the value of attention_bias
    qk_norm: QKNorm | None = None
    pre_norms: bool = True  # whether norms precede attention and feed-forward
    post_norms: bool = False  # whether norms follow attention and feed-forward
    norm_offset: float = 0.0  # added to a norm's weight
    scales_embedding: bool = False  # whether embeddings are multiplied by the square root of the model width
    local_rope_field: str | None = None  # field with the RoPE base of layers with a window, if it is different
    # Hugging Face names of modules that differ from `weights.MODULE_NAMES`
    module_names: Mapping[str, str] = field(default_factory=dict)


def _like(base: Family, defaults: Fields, **properties: Any) -> Family:
    """A family like `base`, with additional defaults and changed properties."""
    return replace(base, defaults={**base.defaults, **defaults}, **properties)


_LLAMA = Family(
    {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
    }
)
_QWEN = _like(
    _LLAMA,
    {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
    },
    slides=lambda i, fields: i >= fields["max_window_layers"],
)
_GEMMA = _like(
    _LLAMA,
    {
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    slides=lambda i, fields: i % 2 == 0,
    activation_field="hidden_activation",
    post_norms=True,
    norm_offset=1.0,
    scales_embedding=True,
    module_names={"mlp_norm": "pre_feedforward_layernorm"},
)

FAMILIES: dict[str, Family] = {  # by the model_type of config.json
    "llama": _LLAMA,
    "mistral": _like(
        _LLAMA,
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
        slides=lambda i, fields: True,
    ),
    "qwen2": _like(_QWEN, {}, qkv_bias=True, output_bias=False),
    "qwen3": _like(_QWEN, {"head_dim": 128}, qk_norm="head"),
    "gemma2": _GEMMA,
    "gemma3_text": _like(
        _GEMMA,
        {
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "max_position_embeddings": 131_072,
        },
        slides=lambda i, fields: (i + 1) % fields["sliding_window_pattern"] != 0,
        qk_norm="head",
        local_rope_field="rope_local_base_freq",
    ),
    "granite": _like(
        _LLAMA,
        {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "olmo2": _like(_LLAMA, {"rms_norm_eps": 1e-5}, qk_norm="projection", pre_norms=False, post_norms=True),
}
