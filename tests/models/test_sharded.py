"""A model on eight simulated devices: the results of one device, and the shardings of stored arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.errors import UserError
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.planning.hlo import Module
from camopd_jax.runtime.mesh import make_mesh, sharding

LAYERS, ROWS, SLOTS, WIDTH, VOCAB = 3, 8, 28, 48, 44
FIELDS = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=20,
    num_hidden_layers=LAYERS,
    head_dim=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
CONFIGS = {
    "qwen3": from_hf(FIELDS | dict(model_type="qwen3")),
    "gemma2": from_hf(
        FIELDS
        | dict(
            model_type="gemma2",
            tie_word_embeddings=True,
            query_pre_attn_scalar=11,
            sliding_window=5,
            attn_logit_softcapping=2.0,
        )
    ),
}
MESHES = [(1, 2, 4), (2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 2)]


def on_mesh(config, sizes, **fields):
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    return Model(config, mesh=mesh, **fields), jax.device_put(
        Model(config).init(jax.random.key(7)), shardings(config, mesh)
    )


def tokens(model, slots=SLOTS):
    rows = np.random.default_rng(1).integers(0, VOCAB, (ROWS, slots)).astype(np.int32)
    return rows if model.mesh is None else jax.device_put(rows, sharding(model.mesh, "batch"))


def gradient(model, params, rows):
    """Compiled: the mean square of the hidden states, the hidden states, and the gradient."""
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(*rows.shape, WIDTH)), jnp.float32)

    def loss(params, rows):
        hidden = model.hidden(params, rows)
        return jnp.mean(jnp.square(hidden) + weights * hidden), hidden

    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, rows).compile()


@pytest.fixture(scope="module")
def alone():
    """{family: result on one device}."""
    return {name: _alone(config) for name, config in CONFIGS.items()}


def _alone(config):
    model = Model(config)
    params, rows = model.init(jax.random.key(7)), tokens(model)
    return gradient(model, params, rows)(params, rows)


@pytest.mark.parametrize("family, sizes", [("qwen3", sizes) for sizes in MESHES] + [("gemma2", (1, 2, 4))])
def test_a_mesh_gives_the_same_numbers_and_splits_residuals(family, sizes, alone):
    model, params = on_mesh(CONFIGS[family], sizes)
    rows = tokens(model)
    compiled = gradient(model, params, rows)
    (value, hidden), grads = compiled(params, rows)
    (expected, expected_hidden), expected_grads = alone[family]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(hidden, expected_hidden, atol=2e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), grads, expected_grads)

    data, fsdp, tensor = sizes
    kept = {dims for i in Module(compiled.as_text()).instructions() for _, dims in i.arrays}
    assert (LAYERS, ROWS // (data * fsdp), SLOTS // tensor, WIDTH) in kept, "the inputs of all layers"
    if tensor > 1:
        assert (LAYERS, ROWS // (data * fsdp), SLOTS, WIDTH) not in kept
        assert hidden.sharding.shard_shape(hidden.shape) == (ROWS // (data * fsdp), SLOTS, WIDTH)


def test_the_error_for_a_wrong_mesh_names_possible_sizes():
    """Nine query heads and three key/value heads, as in SmolLM2-135M."""
    config = from_hf(SHAPES["smollm2-135m"])
    message = r"^config\.mesh\.tensor is 2, which does not divide the model's heads = 9, kv_heads = 3; with up to 8 "
    with pytest.raises(UserError, match=message + r"devices it can be 1, 3$"):
        shardings(config, make_mesh(2, 2, 2))
    with pytest.raises(
        UserError, match=r"config\.mesh\.fsdp is 7, .* embed = 576; with up to 7 devices it can be 1, 2, 3, 4, 6$"
    ):
        shardings(config, make_mesh(1, 7, 1, devices=jax.devices()[:7]))
    with pytest.raises(UserError, match="kv_heads = 4; with up to 8 devices it can be 1, 2, 4$"):  # 8 heads would do
        shardings(from_hf(FIELDS | dict(model_type="qwen3", intermediate_size=24, vocab_size=48)), make_mesh(1, 1, 8))
    assert shardings(config, make_mesh(1, 1, 3, devices=jax.devices()[:3]))


def test_indivisible_slots_are_not_split():
    (alone, params), (model, spread) = (on_mesh(CONFIGS["qwen3"], sizes) for sizes in [(1, 1, 1), (1, 2, 4)])
    np.testing.assert_allclose(
        jax.jit(model.hidden)(spread, tokens(model, 27)), jax.jit(alone.hidden)(params, tokens(alone, 27)), atol=2e-5
    )


def test_decoding_on_a_mesh_communicates_only_tokens():
    """A single slot is not split: prefill and decode give the same results as on one device."""

    def decoded(sizes):
        model, params = on_mesh(CONFIGS["gemma2"], sizes)
        rows = tokens(model)
        lengths = jnp.full((ROWS,), SLOTS - 1, jnp.int32).at[3].set(11)
        apart = jax.jit(model.for_decoding)(params)
        hidden, cache = jax.jit(model.prefill)(apart, rows, lengths)
        last, _ = jax.jit(model.decode)(apart, rows[:, -1], lengths, cache, jnp.int32(SLOTS - 1))
        return np.asarray(hidden)[:, :11], last, cache.keys[0].sharding

    (hidden, last, _), (spread_hidden, spread_last, place) = decoded((1, 1, 1)), decoded((1, 2, 4))
    np.testing.assert_allclose(spread_hidden, hidden, atol=2e-5)
    np.testing.assert_allclose(spread_last, last, atol=2e-5)
    assert place.shard_shape((ROWS, 4, SLOTS, 6)) == (ROWS // 2, 1, SLOTS, 6)
