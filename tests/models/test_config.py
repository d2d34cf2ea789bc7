"""config.json of transformers 4 and 5, and unsupported fields."""

import json
import math

import pytest
from transformers import GenerationConfig

from camopd_jax.errors import UserError
from camopd_jax.models import config
from camopd_jax.models.config import from_hf
from camopd_jax.models.families import FAMILIES
from camopd_jax.models.fields import HARMLESS

SIZES = dict(
    vocab_size=98,
    hidden_size=60,
    intermediate_size=56,
    num_hidden_layers=7,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
)


def test_llama_configs_of_transformers_4_and_5_are_equal():
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    four = SIZES | dict(model_type="llama", rope_theta=5e5, rope_scaling=scaling | {"rope_type": "llama3"})
    five = SIZES | dict(model_type="llama", rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5})
    assert from_hf(four) == from_hf(five)
    assert from_hf(four).ropes[0].theta == 5e5


def test_gemma3_configs_of_transformers_4_and_5_are_equal():
    both = SIZES | dict(model_type="gemma3_text", sliding_window=5)
    four = both | dict(
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    five = both | dict(
        layer_types=types,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert from_hf(four) == from_hf(five)
    assert from_hf(four).windows == (5, 5, None, 5, 5, None, 5)


def test_layer_types_replace_the_pattern():
    """EXAONE 4 has both, and its pattern is no number."""
    types = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
    config = from_hf(SIZES | dict(model_type="exaone4", layer_types=types, sliding_window_pattern="LLLG"))
    assert config.windows == (4096, None) * 3 + (None,)
    assert [config.ropes[i].scaling for i in config.layer_rope] == ["default", "none"] * 3 + ["none"]
    full = SIZES | dict(model_type="exaone4", layer_types=["full_attention"] * 7, sliding_window_pattern=None)
    config = from_hf(full | dict(sliding_window=None))  # the 1.2B model: without windows, every layer has RoPE
    assert [config.ropes[i].scaling for i in config.layer_rope] == ["default"] * 7


def test_gelu_of_gemma_is_the_approximation():
    gemma = SIZES | dict(model_type="gemma")
    assert from_hf(gemma | {"hidden_act": "gelu"}) == from_hf(gemma)
    with pytest.raises(UserError, match="activation 'gelu' is not supported"):
        from_hf(SIZES | dict(model_type="llama", hidden_act="gelu"))


def test_old_llama_2_scaling_type():
    old = from_hf(SIZES | dict(model_type="llama", rope_scaling={"type": "linear", "factor": 4.0}))
    assert old.ropes[0].scaling == "linear" and old.ropes[0].factor == 4.0


def test_dynamic_scaling_depends_on_the_context():
    config = SIZES | dict(
        model_type="llama", max_position_embeddings=100, rope_scaling={"type": "dynamic", "factor": 2.0}
    )
    assert from_hf(config, context=100).ropes[0].theta == 1e4
    assert from_hf(config, context=300).ropes[0].theta == pytest.approx(1e4 * (2.0 * 3 - 1) ** (14 / 12))


def test_windows():
    mistral = SIZES | dict(model_type="mistral")
    assert from_hf(mistral | {"sliding_window": 9}).windows == (9,) * 7
    assert from_hf(mistral | {"sliding_window": None}).windows == (None,) * 7
    qwen = SIZES | dict(model_type="qwen2", sliding_window=9, max_window_layers=5)
    assert from_hf(qwen | {"use_sliding_window": False}).windows == (None,) * 7
    assert from_hf(qwen | {"use_sliding_window": True}).windows == (None,) * 5 + (9, 9)
    assert from_hf(SIZES | dict(model_type="gemma2", sliding_window=9)).windows == (9, None, 9, None, 9, None, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": "gemma3"}, "field text_config is None; give an object"),
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not supported; supported are llama"),
        ({"model_type": "qwen3_5_text"}, "model_type 'qwen3_5_text' is not supported; supported are llama"),
        (
            {"model_type": "cohere2", "use_parallel_block": False},
            "field use_parallel_block is False; cohere2 supports only True",
        ),
        ({"model_type": "cohere", "use_qk_norm": True}, "field use_qk_norm = True is not known for cohere"),
        ({"model_type": "Llama"}, r"model_type 'Llama' is not supported; supported are .*; did you mean 'llama'\?"),
        ({"model_type": None, "architectures": ["Qwen3MoeForCausalLM"]}, "did you mean 'qwen3_moe'"),
        ({"layer_types": ["sliding_attention"] * 7}, "field layer_types = .* is not known for llama"),
        ({"partial_rotary_factor": 0.5}, "field partial_rotary_factor = 0.5 is not known"),
        ({"max_window_layers": 3, "sliding_window": 4}, "field max_window_layers = 3 is not known"),
        ({"num_experts": 8}, "field num_experts = 8 is not known for llama"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"hidden_size": None}, "field hidden_size is None"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "RoPE scaling 'proportional' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs the field factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "RoPE field beta_fast = 32"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_fields_that_may_change_the_output_are_errors(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        from_hf(SIZES | {"model_type": "llama"} | changes, where="model/config.json")
    assert str(caught.value).startswith("model/config.json: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_with_a_default_is_read(family, monkeypatch):
    """A field with a default is not refused: were it not read either, it would be ignored silently."""
    read, understood = set(), config.checked_fields

    class Recorder(dict):
        def __getitem__(self, field):
            read.add(field)
            return super().__getitem__(field)

        def get(self, field, default=None):
            read.add(field)
            return super().get(field, default)

    def recorded(*arguments):
        fields, row = understood(*arguments)
        return Recorder(fields), row

    monkeypatch.setattr(config, "checked_fields", recorded)
    from_hf(SIZES | dict(model_type=family, head_dim=12))
    unread = FAMILIES[family].defaults.keys() - read
    assert unread == ({"hidden_act"} if "hidden_activation" in read else set())  # Gemma has the second in its place


def test_layer_types_must_fit():
    with pytest.raises(UserError, match="layer_types"):
        from_hf(SIZES | dict(model_type="qwen3", layer_types=["full_attention"] * 6))


def test_fields_of_generation_and_of_old_versions_change_nothing():
    plain = SIZES | dict(model_type="llama")
    others = dict(temperature=0.7, top_p=0.9, top_k=40, max_length=20, max_sequence_length=4096, _commit_hash="0")
    others |= dict(_flash_attn_2_enabled=True, num_labels=2, id2label={"0": "a"}, torchscript=True, do_sample=True)
    assert from_hf(plain | others) == from_hf(plain)


@pytest.mark.parametrize(
    "neutral",
    [
        {"partial_rotary_factor": 1.0},
        {"layer_types": ["full_attention"] * 7},
        {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": None},
        {"hidden_act": "swish"},
        {"_attn_implementation": "sdpa", "max_seq_length": 4096, "padding_side": "left"},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_values_that_change_nothing(neutral):
    plain = SIZES | dict(model_type="llama")
    assert from_hf(plain | neutral) == from_hf(plain)


def test_every_field_of_transformers_generation_config_is_one():
    assert set(vars(GenerationConfig())) - HARMLESS == set()
    assert not HARMLESS & {"per_layer_config", "pruned_heads", "add_cross_attention"}, "these change the output"


NAN, HUGE = math.nan, 10**400  # JSON in Python reads NaN, and integers of any length
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


@pytest.mark.parametrize(
    ("family", "field", "value", "kind"),
    [
        ("llama", "num_hidden_layers", "three", "an integer > 0"),
        ("llama", "num_hidden_layers", 0, "an integer > 0"),
        ("llama", "num_hidden_layers", True, "an integer > 0"),
        ("llama", "vocab_size", -3, "an integer > 0"),
        ("llama", "intermediate_size", 56.0, "an integer > 0"),
        ("llama", "max_position_embeddings", 0, "an integer > 0"),
        ("llama", "num_key_value_heads", 0, "an integer > 0 or null"),
        ("llama", "head_dim", -14, "an integer > 0 or null"),
        ("llama", "rms_norm_eps", NAN, "a finite number > 0"),
        ("llama", "rms_norm_eps", -1e-6, "a finite number > 0"),
        ("llama", "rms_norm_eps", "1e-6", "a finite number > 0"),
        ("llama", "rms_norm_eps", HUGE, "a finite number > 0"),
        ("llama", "initializer_range", math.inf, "a finite number >= 0"),
        ("llama", "rope_theta", 0, "a finite number > 0"),
        ("llama", "rope_theta", None, "a finite number > 0"),
        ("llama", "rope_scaling", "linear", "an object or null"),
        ("llama", "rope_parameters", [], "an object or null"),
        ("llama", "tie_word_embeddings", "false", "true or false"),
        ("llama", "attention_bias", None, "true or false"),
        ("llama", "hidden_act", ["silu"], "a string or null"),
        ("llama", "eos_token_id", "2", "an integer or a list of them or null"),
        ("llama", "eos_token_id", [2, "3"], "an integer or a list of them or null"),
        ("mistral", "sliding_window", 0, "an integer > 0 or null"),
        ("qwen2", "max_window_layers", -1, "an integer >= 0"),
        ("qwen3", "layer_types", "full_attention", "a list of strings or null"),
        ("qwen3", "layer_types", [None] * 7, "a list of strings or null"),
        ("gemma2", "query_pre_attn_scalar", 0, "a finite number > 0"),
        ("gemma2", "attn_logit_softcapping", 0.0, "a finite number > 0 or null"),
        ("gemma2", "final_logit_softcapping", NAN, "a finite number > 0 or null"),
        ("gemma3_text", "sliding_window_pattern", 0, "an integer > 0"),
    ],
)
def test_a_value_beyond_its_limits_is_named(family, field, value, kind):
    fields = json.loads(json.dumps(SIZES | {"model_type": family, field: value}))
    with pytest.raises(UserError) as caught:
        from_hf(fields, where="model/config.json")
    assert str(caught.value) == f"model/config.json: field {field} is {value!r}; give {kind}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7}, "num_key_value_heads is 2, which does not divide num_attention_heads = 7"),
        (
            {"head_dim": None, "num_attention_heads": 8},
            "num_attention_heads is 8, which does not divide hidden_size = 60",
        ),
        ({"head_dim": 15}, "head_dim is 15; RoPE needs an even number"),
        (
            {"head_dim": None, "num_attention_heads": 4},
            "hidden_size / num_attention_heads is 15; RoPE needs an even number",
        ),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "field factor is 0; give a finite number > 0"),
        ({"rope_parameters": {"rope_theta": NAN}}, "field rope_theta is nan; give a finite number > 0"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"RoPE scaling \['linear'\] is not supported"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "field low_freq_factor is 4.0; give a number < high"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0.5}},
            "field original_max_position_embeddings is 0.5; give an integer > 0",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters has no block for layers of type sliding_attention",
        ),
    ],
)
def test_fields_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=f"model/config.json: {message}"):
        from_hf(SIZES | {"model_type": "llama"} | changes, where="model/config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_of_a_family_is_without_a_limit(family):
    """A field with a number for its default refuses NaN."""
    for field, value in FAMILIES[family].defaults.items():
        if isinstance(value, int | float) and not field.startswith("rope_"):
            with pytest.raises(UserError, match=f"field {field} is nan"):
                from_hf(SIZES | {"num_key_value_heads": 2, "model_type": family, field: NAN})
