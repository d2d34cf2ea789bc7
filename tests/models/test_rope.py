"""Frequencies and attention factors of RoPE against transformers, and mistakes in its fields."""

import copy
import itertools

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from camopd_jax.errors import UserError
from camopd_jax.models.config import from_hf
from camopd_jax.models.rope import frequencies

SIZES = dict(hidden_size=60, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6, vocab_size=98)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0)
SHORT, LONG = [1.0 + 0.1 * i for i in range(24)], [1.0 + 0.5 * i for i in range(24)]
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=SHORT, long_factor=LONG)


def compare(config, context=None):
    """Compares a transformers config's RoPE with ours, each in its own precision."""
    parameters = config.rope_parameters
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=context)
    ours = from_hf(config.to_dict(), context=context)
    assert len(ours.ropes) == 1
    np.testing.assert_allclose(frequencies(ours.ropes[0], ours.rotary_dim), theirs.numpy(), rtol=1e-6)
    assert ours.ropes[0].attention_factor == pytest.approx(factor, rel=1e-12)
    assert ours.rotary_dim == 2 * len(theirs)
    return ours.ropes[0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Qwen3", YARN | dict(original_max_position_embeddings=32768)),  # as in the cards of Qwen
        ("Llama", YARN),  # the original context is max_position_embeddings
        ("Llama", YARN | dict(original_max_position_embeddings=4096, attention_factor=1.25)),
        ("Llama", YARN | dict(factor=40.0, mscale=1.0, mscale_all_dim=0.7, original_max_position_embeddings=4096)),
        ("Llama", YARN | dict(factor=40.0, mscale=1.0, original_max_position_embeddings=4096)),
        ("Llama", YARN | dict(beta_fast=20.0, beta_slow=2.0, original_max_position_embeddings=512)),
        ("Llama", YARN | dict(truncate=False, original_max_position_embeddings=8192)),
        ("Llama", YARN | dict(factor=None, original_max_position_embeddings=8192)),
        ("Llama", YARN | dict(factor=0.5)),
        ("Llama", YARN | dict(beta_fast=1e9, beta_slow=1e9, original_max_position_embeddings=8)),  # a ramp of no width
    ],
)
def test_yarn_equals_transformers(name, fields):
    config = getattr(transformers, f"{name}Config")(
        **SIZES, num_key_value_heads=2, head_dim=64, max_position_embeddings=40960, rope_parameters=dict(fields)
    )
    rope = compare(config)
    assert rope.scaling == "yarn"


@pytest.mark.parametrize("context", [4096, 4097])
@pytest.mark.parametrize("fields", [{}, {"factor": 3.0}, {"attention_factor": 1.4}])
def test_longrope_equals_transformers_on_both_sides_of_the_original_context(context, fields):
    config = transformers.Phi3Config(
        **SIZES | dict(hidden_size=384),
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=LONGROPE | dict(partial_rotary_factor=0.75) | fields,
    )
    rope = compare(config, context)
    assert rope.factors == tuple(LONG if context > 4096 else SHORT)


def test_longrope_as_phi_has_it_in_transformers_4():
    """`original_max_position_embeddings` and `partial_rotary_factor` beside `rope_scaling`, and the name "su"."""
    both = SIZES | dict(model_type="phi3", hidden_size=384, max_position_embeddings=131072)
    four = both | dict(
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_theta=1e4,
        rope_scaling=dict(type="su", short_factor=SHORT, long_factor=LONG),
    )
    five = both | dict(
        original_max_position_embeddings=4096, rope_parameters=LONGROPE | dict(partial_rotary_factor=0.75)
    )
    assert from_hf(four) == from_hf(five)
    assert from_hf(four).rotary_dim == 48


def test_layers_without_rotation_have_angles_of_zero():
    config = from_hf(SIZES | dict(model_type="smollm3", num_key_value_heads=2, num_hidden_layers=5))
    assert [config.ropes[i].scaling for i in config.layer_rope] == ["default"] * 3 + ["none", "default"]
    assert not frequencies(config.ropes[1], 10).any()


TYPES = ["full_attention", "sliding_attention"]
LINEAR, SHORT_YARN = dict(rope_type="linear", factor=3.0), YARN | dict(original_max_position_embeddings=512)
THETAS = (None, 7e4)
SCALINGS = (None, LINEAR, SHORT_YARN | dict(truncate=False), dict(rope_type="linear", factor=2.0, rope_theta=3e5))
FLAT = (None, {}, LINEAR, SHORT_YARN, {"rope_theta": 9e4})
BY_TYPE = (
    None,
    dict(full_attention=LINEAR, sliding_attention={"rope_type": "default"}),
    dict(full_attention={"rope_theta": 9e4}, sliding_attention=dict(rope_type="linear", factor=5.0, rope_theta=2e4)),
    dict(full_attention=SHORT_YARN | dict(truncate=False), sliding_attention={"rope_theta": 2e4}),
)


@pytest.mark.parametrize(
    ("model_type", "rotation", "blocks"),
    [
        ("llama", LlamaRotaryEmbedding, FLAT),
        ("gpt_oss", GptOssRotaryEmbedding, FLAT),
        ("gemma3_text", Gemma3RotaryEmbedding, BY_TYPE),
        ("olmo3", Olmo3RotaryEmbedding, BY_TYPE),
    ],
)
def test_fields_of_transformers_4_and_5_at_once(model_type, rotation, blocks):
    """Which of rope_theta, rope_scaling and rope_parameters is used: the frequencies that transformers has."""
    sizes = SIZES | dict(num_key_value_heads=2, head_dim=64, max_position_embeddings=4096)
    sizes |= {} if model_type == "llama" else dict(layer_types=TYPES, sliding_window=8)
    compared = 0
    for values in itertools.product(THETAS, SCALINGS, blocks):
        given = zip(("rope_theta", "rope_scaling", "rope_parameters"), values, strict=True)
        fields = sizes | {name: value for name, value in given if value is not None}
        config = transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields))
        theirs = rotation(config)
        try:
            ours = from_hf(fields | {"model_type": model_type})
        except UserError as error:  # fields of another scaling, which transformers ignores
            assert "original_max_position_embeddings = 512 is not supported for scaling 'linear'" in str(error)
            continue
        for i, layer_type in enumerate(TYPES):
            prefix = "" if hasattr(theirs, "inv_freq") else f"{layer_type}_"
            rope = ours.ropes[ours.layer_rope[i]]
            expected = getattr(theirs, f"{prefix}inv_freq").numpy()
            np.testing.assert_allclose(frequencies(rope, 64), expected, rtol=1e-6, err_msg=f"{layer_type} {fields}")
            assert rope.attention_factor == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"), rel=1e-12)
            compared += 1
    assert compared >= 56


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "rope_parameters": BY_TYPE[1]}, "RoPE field full_attention = .* is not supported"),
        (
            {"model_type": "olmo3", "rope_parameters": LINEAR},
            "rope_parameters has no block for layers of type sliding",
        ),
    ],
)
def test_blocks_that_transformers_ignores_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        from_hf(SIZES | {"num_key_value_heads": 2, "head_dim": 64} | changes)


LLAMA, PHI = {"model_type": "llama", "head_dim": 64}, {"model_type": "phi3"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (LLAMA | {"rope_parameters": YARN | {"rope_theta": 1.0}}, "field rope_theta is 1.0; give a finite number > 1"),
        (LLAMA | {"rope_parameters": YARN | {"beta_fast": -1}}, "field beta_fast is -1; give a finite number > 0"),
        (LLAMA | {"rope_parameters": YARN | {"truncate": 0}}, "field truncate is 0; give true or false"),
        (LLAMA | {"rope_parameters": YARN | {"mscale": -1.0}}, "field mscale is -1.0; give a finite number >= 0"),
        (LLAMA | {"rope_parameters": YARN | {"long_factor": LONG}}, "RoPE field long_factor = .* for scaling 'yarn'"),
        (
            LLAMA | {"rope_parameters": {**LONGROPE, "long_factor": None}},
            "RoPE scaling .* needs the field long_factor",
        ),
        (
            LLAMA | {"rope_parameters": {**LONGROPE, "long_factor": [1, "2"]}},
            "field long_factor is .*; give a list of finite",
        ),
        (LLAMA | {"rope_parameters": LONGROPE}, "RoPE field short_factor has 24 numbers; give 32"),
        (
            PHI | {"hidden_size": 288, "original_max_position_embeddings": 1, "rope_parameters": LONGROPE},
            "field original_max_position_embeddings is 1; give a finite number > 1",
        ),
        (PHI | {"partial_rotary_factor": 1.5}, "field partial_rotary_factor is 1.5; give a number > 0 and <= 1"),
        (PHI | {"rope_parameters": {"partial_rotary_factor": 0.3}}, "partial_rotary_factor is 0.3, which rotates 3 of"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 numbers; give 2"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 2]},
            "field no_rope_layers is .*; give a list of 0 and 1",
        ),
        (
            {"model_type": "ministral3", "rope_parameters": YARN},
            "field llama_4_scaling_beta is None; give a finite number >= 0",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=f"model/config.json: {message}"):
        from_hf(SIZES | {"num_key_value_heads": 2} | fields, where="model/config.json")
