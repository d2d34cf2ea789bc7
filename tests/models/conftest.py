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
}


OWN_ROW = [name for name in FAMILIES if name != "vaultgemma"]  # families in camopd_jax/models/families.py
FEW = ("qwen3", "gemma3", "olmo2")  # between them all that layers do


@pytest.fixture(params=[pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in OWN_ROW])
def family_or_slow(request):
    """Every family, most of them in the slow suite."""
    return request.param


@pytest.fixture(params=OWN_ROW)
def family(request):
    """Each family in turn, for the tests that every family has to pass."""
    return request.param


def build(family: str, **changes):
    """A torch model of a family in which every parameter affects the output."""
    name, fields = FAMILIES[family]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + suffix)(**SIZES | fields | changes)
    torch.manual_seed(len(family))
    model = getattr(transformers, name + "ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
            parameter.add_(
                0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.1 * torch.randn_like(parameter)
            )
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
