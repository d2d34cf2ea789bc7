"""The GPU kernel of attention over a cache, interpreted, compared with plain attention."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.errors import UserError
from camopd_jax.models import cached
from camopd_jax.models.attention import attend
from camopd_jax.models.config import AttentionSpec, from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import EMPTY

FIELDS = dict(
    model_type="qwen3",
    vocab_size=22,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.3,
)
ROWS, HEADS, GROUPS, WIDTH, PROMPT = 4, 6, 2, 16, 16
PROMPTS = np.array([16, 5, 9, 1])


def arrays(slots, dtype="float32"):
    """A query per row, and a cache whose prompts end early; the ring behind them has wrapped around."""
    random = np.random.default_rng(slots)
    query = random.normal(size=(ROWS, 1, HEADS, WIDTH))
    key, value = random.normal(size=(2, ROWS, GROUPS, slots, WIDTH))
    ring = slots - PROMPT
    written = np.array([ring, 3, ring // 2, ring])  # tokens of each answer that are in the ring
    positions = np.full((ROWS, slots), EMPTY, np.int32)
    for row in range(ROWS):
        positions[row, : PROMPTS[row]] = np.arange(PROMPTS[row])
        for t in range(written[row]):
            positions[row, PROMPT + (7 + t) % ring] = PROMPTS[row] + t
    last = PROMPTS + written - 1
    return *(jnp.asarray(x, dtype) for x in (query, key, value)), jnp.asarray(last)[:, None], jnp.asarray(positions)


@pytest.mark.parametrize(
    ("slots", "case"),
    [
        (32, {}),
        (16 + 112, {}),
        (16 + 80, dict(windows=(5,))),
        (16 + 64, dict(windows=(None, 40), window_index=1, softcap=2.0)),
        (128 + 256, dict(windows=(37, None), window_index=jnp.int32(0))),
    ],
)
def test_the_kernel_equals_plain_attention(slots, case):
    windows, softcap = case.get("windows", (None,)), case.get("softcap")
    index, operands = case.get("window_index", 0), arrays(slots)

    def outcome(implementation, mesh):
        spec = AttentionSpec(windows, 0.3, softcap, "xla", mesh, implementation)
        return jax.jit(lambda *of: attend(*of, spec, index))(*operands)

    expected = outcome("xla", None)
    for sizes in ((1, 1, 1), (2, 1, 2)):
        mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        np.testing.assert_allclose(outcome("fused", mesh), expected, atol=2e-6)


@pytest.mark.gpu
def test_bfloat16_is_summed_in_float32():
    operands = arrays(144, "bfloat16")
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    got, plain, exact = (
        np.asarray(attend(*of, AttentionSpec((None,), 0.3, None, "xla", mesh, how)), np.float32)
        for how, of in (("fused", operands), ("xla", operands), ("xla", arrays(144)))
    )
    assert np.abs(got - exact).max() < 1.5 * np.abs(plain - exact).max()


def test_a_model_decodes_the_same_tokens(monkeypatch):
    """Two prompts of different lengths and twelve turns, which fill a cache of 16 slots; windows on some layers."""
    monkeypatch.setattr(cached, "unsupported_reason", lambda *of: None)
    config = from_hf(FIELDS | dict(model_type="gemma2", sliding_window=5, attn_logit_softcapping=2.0))
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    plain, kernel = Model(config, mesh=mesh), Model(config, mesh=mesh, decode_attention="fused")
    params = jax.device_put(plain.init(jax.random.key(1)), shardings(config, mesh))
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 22, (2, 4)), jnp.int32)
    outcomes = []
    for model in (plain, kernel):
        weights = jax.jit(model.for_decoding)(params)
        hidden, cache = jax.jit(model.prefill)(weights, prompts, jnp.array([4, 2]))
        cache = cache.replace(
            keys=tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 12), (0, 0))) for x in cache.keys),
            values=tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 12), (0, 0))) for x in cache.values),
            positions=jnp.pad(cache.positions, ((0, 0), (0, 12)), constant_values=EMPTY),
        )
        decode, states = jax.jit(model.decode), []
        for turn in range(12):
            token = jnp.array([3 + turn, 5], jnp.int32)
            hidden, cache = decode(weights, token, jnp.array([4 + turn, 2 + turn]), cache, jnp.int32(4 + turn))
            states.append(np.asarray(hidden))
        outcomes.append(np.stack(states))
    np.testing.assert_allclose(outcomes[1], outcomes[0], atol=2e-5)


def test_the_kernel_is_lowered_for_a_gpu():
    """To Triton's language, which needs no GPU; its own compiler, which does, is not run here."""
    query, key, _, _, positions = arrays(144, "bfloat16")
    attention = jax.jit(partial(cached._attend, scale=0.3, softcap=2.0, interpret=False))
    text = attention.trace(query, key, key, positions != EMPTY).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text


def test_unsupported_models_are_an_error():
    def why(dtype="bfloat16", **fields):
        mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
        return cached.unsupported_reason(from_hf(FIELDS | fields), mesh, dtype)

    assert why() is None
    assert "multiplies bfloat16, not float32" in why("float32")
    assert "power of two from 16 on, not 96" in why(head_dim=96)
    with pytest.raises(UserError, match=r"config\.compute\.decode_attention is 'fused'; only GPUs"):
        Model(from_hf(FIELDS), mesh=make_mesh(), decode_attention="fused")
