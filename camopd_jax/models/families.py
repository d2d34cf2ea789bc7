"""The supported model families, one row each.

A row has the information that is not in `config.json`: the defaults of transformers for missing fields, and the fixed
properties of the architecture. `config.from_hf` combines a row and a `config.json` into a `ModelConfig`; no other
module depends on families.
"""

from dataclasses import replace
from typing import Any

from camopd_jax.models.family import Family, Fields


def _like(base: Family, defaults: Fields, **properties: Any) -> Family:
    """A family like `base`, with additional defaults and changed properties."""
    return replace(base, defaults={**base.defaults, **defaults}, **properties)


_COMMON = Family(
    {
        "hidden_act": "silu",
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
_LLAMA = _like(_COMMON, {"rms_norm_eps": 1e-6})


def _smollm3_rotates(i: int, windowed: bool, fields: Fields) -> bool:
    """Whether layer i of SmolLM3 has RoPE."""
    layers, interval = fields["no_rope_layers"], fields["no_rope_layer_interval"]
    return bool(layers[i]) if layers is not None else (i + 1) % interval != 0


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
_GEMMA_COMMON = _like(
    _LLAMA,
    {
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "final_logit_softcapping": 30.0,
    },
    activation_field="hidden_activation",
    post_norms=True,
    scales_embedding=True,
    module_names={"mlp_norm": "pre_feedforward_layernorm"},
)
_GEMMA = _like(
    _GEMMA_COMMON,
    {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0},
    slides=lambda i, fields: i % 2 == 0,
    norm_offset=1.0,
)
_OLMO2 = _like(_LLAMA, {"rms_norm_eps": 1e-5}, qk_norm="projection", pre_norms=False, post_norms=True)
_FUSED_MLP = {"mlp.gate": "mlp.gate_up_proj", "mlp.up": "mlp.gate_up_proj"}
_EXPERTS = {"mlp.router": "mlp.gate"} | {
    f"mlp.{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")
}
_STACKED = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}  # tensors with all experts of a layer
_PARTIAL = frozenset({"partial_rotary_factor"})
_GLM = _like(
    _LLAMA,
    {
        "rms_norm_eps": 1.5625e-7,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    output_bias=False,
    rope_fields=_PARTIAL,
    interleaved_rope=True,
    module_names=_FUSED_MLP,
)
_COHERE = _like(
    _COMMON,
    {
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
        "logit_scale": 0.0625,
    },
    norm="layer",
    eps_field="layer_norm_eps",
    parallel=True,
    interleaved_rope=True,
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
            "vocab_size": 262_208,
            "num_attention_heads": 8,
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
    "gemma4_text": _like(
        _GEMMA_COMMON,
        {
            "vocab_size": 262_144,
            "num_attention_heads": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            },
            "sliding_window": 512,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
            "global_head_dim": 512,
            "num_global_key_value_heads": None,
            "attention_k_eq_v": False,
            "per_layer_config": None,
            "enable_moe_block": False,
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
        },
        slides=lambda i, fields: (i + 1) % 6 != 0,
        rope_fields=_PARTIAL,
        qk_norm="head",
        norm_offset=0.0,
        local_rope_field="rope_theta",
        global_attention=True,
        value_norm=True,
        layer_scalar=True,
        experts_field="num_experts",
        experts_flag="enable_moe_block",
        per_token_field="top_k_experts",
        stacked_experts="halves",
        scaled_router=True,
        dense_beside_experts=True,
        fixed={"use_bidirectional_attention": "vision"},  # between tokens of one image
        module_names={
            "mlp_norm": "pre_feedforward_layernorm",
            "post_dense_norm": "post_feedforward_layernorm_1",
            "experts_norm": "pre_feedforward_layernorm_2",
            "post_experts_norm": "post_feedforward_layernorm_2",
            "router_norm.scale": "router.scale",
            "experts.router": "router.proj",
            "experts.router.scale": "router.per_expert_scale",
            **{f"experts.{name}.kernel": f"experts.{tensor}" for name, tensor in _STACKED.items()},
            "per_layer_embedding": "model.embed_tokens_per_layer",
            "per_layer_projection": "model.per_layer_model_projection",
            "per_layer_norm": "model.per_layer_projection_norm",
            "input_gate": "per_layer_input_gate",
            "input_projection": "per_layer_projection",
            "post_input_norm": "post_per_layer_input_norm",
            "output_scalar.scale": "layer_scalar",
        },
    ),
    "qwen3_moe": _like(
        _QWEN,
        {
            "head_dim": None,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        qk_norm="head",
        experts_field="num_experts",
        renamed={"num_local_experts": "num_experts"},
        fixed={"decoder_sparse_step": 1},
        module_names=_EXPERTS,
    ),
    "olmoe": _like(
        _LLAMA,
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        qk_norm="projection",
        experts_field="num_experts",
        renamed={"num_local_experts": "num_experts"},
        module_names=_EXPERTS,
    ),
    "mixtral": _like(
        _LLAMA,
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        slides=lambda i, fields: True,
        experts_field="num_local_experts",
        renamed={"num_experts": "num_local_experts"},
        module_names={
            "mlp.router": "block_sparse_moe.gate",
            "mlp.gate": "block_sparse_moe.experts.{}.w1",
            "mlp.up": "block_sparse_moe.experts.{}.w3",
            "mlp.down": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "gpt_oss": _like(
        _LLAMA,
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "rope_parameters": dict(
                rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, truncate=False
            ),
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "mlp_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        slides=lambda i, fields: i % 2 == 0,
        experts_field="num_local_experts",
        renamed={"num_experts": "num_local_experts"},
        stacked_experts="columns",
        attention_sinks=True,
        fixed={"experts_per_token": 4, "initial_context_length": 4096},
        module_names={
            "attention.sinks": "self_attn.sinks",
            "mlp.router": "mlp.router",
            **{f"mlp.{name}.kernel": f"mlp.experts.{tensor}" for name, tensor in _STACKED.items()},
            **{f"mlp.{name}.bias": f"mlp.experts.{tensor}_bias" for name, tensor in _STACKED.items()},
        },
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
    "olmo2": _OLMO2,
    "olmo3": _like(
        _OLMO2,
        {"rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0, "sliding_window": 4096, "layer_types": None},
        slides=lambda i, fields: (i + 1) % 4 != 0,
        local_rope_field="rope_local_base_freq",  # transformers 5 reads rope_theta only for layers without a window
        fixed={"rope_local_base_freq": 500_000.0},
    ),
    "gemma": _like(
        _LLAMA,
        {
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
        },
        activations={"gelu": "gelu_pytorch_tanh"},
        norm_offset=1.0,
        scales_embedding=True,
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "seed_oss": _like(
        _LLAMA,
        {
            "max_position_embeddings": 524_288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    "ministral": _like(
        _LLAMA,
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "layer_types": None},
        slides=lambda i, fields: True,
    ),
    "ministral3": _like(
        _LLAMA,
        {
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        slides=lambda i, fields: True,
        rope_fields=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}),
    ),
    "smollm3": _like(
        _LLAMA,
        {
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        slides=lambda i, fields: not _smollm3_rotates(i, False, fields),
        rotates=_smollm3_rotates,
        fixed={"max_window_layers": 28},
    ),
    "exaone4": _like(
        _LLAMA,
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        slides=lambda i, fields: (i + 1) % fields["sliding_window_pattern"] != 0,
        rotates=lambda i, windowed, fields: windowed or fields["sliding_window"] is None,
        qk_norm="head",
        pre_norms=False,
        post_norms=True,
    ),
    "glm": _GLM,
    "glm4": _like(
        _GLM,
        {},
        post_norms=True,
        module_names={
            **_FUSED_MLP,
            "post_attention_norm": "post_self_attn_layernorm",
            "post_mlp_norm": "post_mlp_layernorm",
        },
    ),
    "phi3": _like(
        _LLAMA,
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
        },
        slides=lambda i, fields: True,
        rope_fields=_PARTIAL,
        fixed={"full_attn_mod": 1, "interpolate_factor": 1},
        published_code="modeling_phi3.Phi3ForCausalLM",
        module_names={
            **dict.fromkeys(("attention.query", "attention.key", "attention.value"), "self_attn.qkv_proj"),
            **_FUSED_MLP,
        },
    ),
    "cohere": _COHERE,
    "cohere2": _like(
        _COHERE,
        {"rope_theta": 10_000.0, "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
        slides=lambda i, fields: (i + 1) % fields["sliding_window_pattern"] != 0,
        rotates=lambda i, windowed, fields: windowed,
        fixed={
            "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0,
            "order_of_interleaved_layers": "local_attn_first",
            "layer_switch": 4,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_embedding_sharing": True,
        },
    ),
    "nemotron": _like(
        _COMMON,
        {
            "hidden_act": "relu2",
            "norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "initializer_range": 0.0134,
            "partial_rotary_factor": 0.5,
        },
        norm="layer",
        norm_bias=True,
        norm_offset=1.0,
        eps_field="norm_eps",
        gated_mlp=False,
        rope_fields=_PARTIAL,
    ),
}
