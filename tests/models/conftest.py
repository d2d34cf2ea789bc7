"""Tiny random checkpoints of every family, made by transformers on torch."""

import pytest
import torch
import transformers

# Sizes with no common factors, so that a swapped axis cannot pass: width 60, 6 heads of 14, 2 groups.
SIZES = dict(
    vocab_size=98,
    hidden_size=60,
    intermediate_size=56,
    num_hidden_layers=3,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEADS = dict(num_attention_heads=6, num_key_value_heads=2)
GEMMA = dict(head_dim=14, query_pre_attn_scalar=11, sliding_window=5, **HEADS)
GEMMA4 = HEADS | dict(  # whose layers have no input of their own
    head_dim=14,
    sliding_window=5,
    global_head_dim=22,
    num_global_key_value_heads=6,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)

FAMILIES = {
    "llama": ("Llama", HEADS | dict(head_dim=14)),
    "llama-untied-biased": ("Llama", HEADS | dict(head_dim=14, attention_bias=True, mlp_bias=True)),
    "llama-linear": (
        "Llama",
        HEADS | dict(head_dim=14, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4)),
    ),
    "llama-dynamic": (
        "Llama",
        HEADS
        | dict(
            head_dim=14,
            max_position_embeddings=16,
            rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
        ),
    ),
    "llama-llama3": (
        "Llama",
        HEADS
        | dict(
            head_dim=14,
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
                rope_theta=1e4,
            ),
        ),
    ),
    "smollm2": ("Llama", dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=72, tie_word_embeddings=True)),
    "mistral": ("Mistral", HEADS | dict(head_dim=14, sliding_window=5)),
    "qwen2": (
        "Qwen2",
        dict(
            num_attention_heads=6, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
    ),
    "qwen3": ("Qwen3", HEADS | dict(head_dim=14)),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "vaultgemma": ("VaultGemma", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": (
        "Gemma3",
        GEMMA
        | dict(
            num_hidden_layers=7,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "granite": (
        "Granite",
        HEADS
        | dict(
            tie_word_embeddings=True,
            embedding_multiplier=5.0,
            attention_multiplier=0.17,
            residual_multiplier=0.22,
            logits_scaling=3.0,
        ),
    ),
    "olmo2": ("Olmo2", HEADS),
    "llama-yarn": ("Llama", HEADS | dict(head_dim=14, rope_parameters=YARN)),
    "qwen3-yarn": (
        "Qwen3",
        HEADS | dict(head_dim=14, rope_parameters=YARN | dict(attention_factor=1.3, beta_fast=5.0)),
    ),
    "olmo3": (
        "Olmo3",
        HEADS
        | dict(
            num_hidden_layers=5,
            sliding_window=5,
            rope_parameters={
                "full_attention": YARN,
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "seed_oss": ("SeedOss", HEADS | dict(head_dim=14)),
    "ministral": ("Ministral", HEADS | dict(head_dim=14, sliding_window=5)),
    "ministral3": (
        "Ministral3",
        HEADS
        | dict(
            head_dim=14,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7, beta_fast=3.0, llama_4_scaling_beta=0.2),
        ),
    ),
    "gemma": ("Gemma", HEADS | dict(head_dim=14)),
    "smollm3": (
        "SmolLM3",
        HEADS | dict(num_hidden_layers=5, use_sliding_window=True, sliding_window=5, no_rope_layers=[1, 0, 1, 0, 1]),
    ),
    "exaone4": ("Exaone4", HEADS | dict(num_hidden_layers=5, sliding_window=5)),
    "glm": ("Glm", HEADS | dict(head_dim=12)),
    "glm4": (
        "Glm4",
        HEADS
        | dict(head_dim=14, attention_bias=False, rope_parameters=dict(partial_rotary_factor=0.75, rope_theta=1e4)),
    ),
    "phi3": ("Phi3", HEADS | dict(sliding_window=5)),
    "phi3-long": (
        "Phi3",
        HEADS
        | dict(
            original_max_position_embeddings=16,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1e4,
                partial_rotary_factor=0.8,
                short_factor=[1.0, 1.1, 1.3, 1.4],
                long_factor=[1.5, 2.5, 4.5, 6.5],
            ),
        ),
    ),
    "cohere": ("Cohere", HEADS | dict(attention_bias=True)),
    "cohere2": ("Cohere2", HEADS | dict(num_hidden_layers=5, sliding_window=5, logit_scale=0.3)),
    "qwen3_moe": (
        "Qwen3Moe",
        HEADS | dict(head_dim=14, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True),
    ),
    "olmoe": ("Olmoe", HEADS | dict(num_experts=5, num_experts_per_tok=2)),
    "mixtral": ("Mixtral", HEADS | dict(head_dim=14, sliding_window=5, num_local_experts=5, num_experts_per_tok=3)),
    "gpt_oss": (
        "GptOss",
        HEADS
        | dict(
            head_dim=14,
            sliding_window=5,
            num_local_experts=5,
            num_experts_per_tok=2,
            intermediate_size=20,
            swiglu_alpha=1.3,
            swiglu_limit=0.4,
            rope_parameters=YARN | dict(truncate=False),
        ),
    ),
    "gemma4": (
        "Gemma4",
        GEMMA4
        | dict(
            num_hidden_layers=4, final_logit_softcapping=3.0, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    ),
    "gemma4_moe": (
        "Gemma4",
        GEMMA4
        | dict(
            num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"],
            enable_moe_block=True,
            num_experts=5,
            top_k_experts=2,
            moe_intermediate_size=20,
        ),
    ),
    "gemma4_small": (
        "Gemma4",
        HEADS
        | dict(
            num_hidden_layers=5,
            head_dim=14,
            sliding_window=5,
            global_head_dim=22,
            final_logit_softcapping=3.0,
            layer_types=["sliding_attention", *["sliding_attention", "full_attention"] * 2],
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=110,
        ),
    ),
    "nemotron": ("Nemotron", HEADS | dict(head_dim=12, mlp_bias=True)),
}


OWN_ROW = [name for name in FAMILIES if name != "vaultgemma"]  # families in camopd_jax/models/families.py
FEW = ("qwen3", "gemma3", "olmo2", "cohere2", "nemotron", "qwen3_moe")  # between them nearly all that layers do
SIMILAR = (
    "qwen3-yarn",
    "olmoe",
    "mixtral",
    "seed_oss",
    "ministral",
    "gemma",
    "glm",
    "phi3",
    "cohere",
    "gpt_oss",
    "gemma4",
    "gemma4_moe",
)  # like others, in the slow suite


def _slow_unless(condition: bool):
    return [] if condition else pytest.mark.slow


@pytest.fixture(params=[pytest.param(name, marks=_slow_unless(name in FEW)) for name in OWN_ROW])
def family_or_slow(request):
    """Every family, most of them in the slow suite."""
    return request.param


@pytest.fixture(params=[pytest.param(name, marks=_slow_unless(name not in SIMILAR)) for name in OWN_ROW])
def family(request):
    """Each family in turn, for the tests that every family has to pass."""
    return request.param


def build(family: str, **changes):
    """A torch model of a family in which every parameter affects the output."""
    name, fields = FAMILIES[family]
    suffix = "TextConfig" if name in ("Gemma3", "Gemma4") else "Config"
    config = getattr(transformers, name + suffix)(**SIZES | fields | changes)
    torch.manual_seed(len(family))
    model = getattr(transformers, name + "ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
            parameter.add_(
                0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.1 * torch.randn_like(parameter)
            )
        for name, constant in model.named_buffers():
            if name.endswith("layer_scalar"):  # of Gemma 4
                constant.add_(0.3 * torch.randn_like(constant))
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> (torch model, its folder)."""
    made = {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = build(family)
            model.save_pretrained(folder)
            made[family] = (model, folder)
        return made[family]

    return get
