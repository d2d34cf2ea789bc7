"""config.json of transformers 4 and 5, and unsupported fields."""

import pytest

from camopd_jax.errors import UserError
from camopd_jax.models import config
from camopd_jax.models.config import from_hf
from camopd_jax.models.families import FAMILIES

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
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported"),
        ({"num_experts": 8}, "field num_experts = 8 is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"hidden_size": None}, "field hidden_size is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported"),
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
    read, understood = set(), config._checked_fields

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

    monkeypatch.setattr(config, "_checked_fields", recorded)
    from_hf(SIZES | dict(model_type=family))
    unread = FAMILIES[family].defaults.keys() - read
    assert unread == ({"hidden_act"} if "hidden_activation" in read else set())  # Gemma has the second in its place


def test_layer_types_must_fit():
    with pytest.raises(UserError, match="layer_types"):
        from_hf(SIZES | dict(model_type="qwen3", layer_types=["full_attention"] * 6))
