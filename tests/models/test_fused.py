"""The fused kernels against plain attention: Pallas interpreted on a CPU, and the call of cuDNN."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.errors import UserError
from camopd_jax.models import fused
from camopd_jax.models.attention import attend
from camopd_jax.models.config import AttentionSpec, from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runtime.mesh import make_mesh

BATCH, SLOTS, HEADS, GROUPS, WIDTH = 4, 200, 4, 2, 64
FIELDS = dict(
    model_type="gemma2",
    vocab_size=22,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    query_pre_attn_scalar=11,
    sliding_window=37,
    attn_logit_softcapping=2.0,
    initializer_range=0.3,
)


@pytest.fixture
def tpu(monkeypatch):
    """Makes CPU devices count as TPUs, so that the kernel is used and interpreted."""
    monkeypatch.setattr(fused, "platform", lambda mesh: "cpu" if mesh is None else "tpu")


def outcome(implementation, mesh, slots=SLOTS, windows=(None,), window=0, softcap=None):
    """The output of attention, and its gradients with respect to queries, keys and values."""
    rng = np.random.default_rng(0)
    query, out = rng.normal(size=(2, BATCH, slots, HEADS, WIDTH)).astype(np.float32)
    key, value = rng.normal(size=(2, BATCH, GROUPS, slots, WIDTH)).astype(np.float32)

    @jax.jit
    def run(query, key, value, window):
        def attention(*qkv):
            spec = AttentionSpec(windows, 0.1, softcap, implementation, mesh)
            return attend(*qkv, jnp.arange(slots)[None, :], None, spec, window)

        result, back = jax.vjp(attention, query, key, value)
        return result, *back(out)

    return run(query, key, value, window if len(windows) == 1 else jnp.int32(window))


@pytest.mark.parametrize(
    "sizes, case",
    [
        ((1, 1, 1), dict(windows=(37,))),
        ((1, 1, 1), dict(softcap=3.0)),
        ((1, 1, 1), dict(windows=(37, None), window=1)),
        ((1, 1, 1), dict(windows=(None, 500), window=1)),
        ((2, 1, 2), dict()),
        ((2, 1, 2), dict(slots=256)),
        ((2, 1, 2), dict(windows=(None, 37), window=1, softcap=3.0)),
    ],
)
def test_splash_equals_plain_attention(sizes, case, tpu):
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    for kernel, plain in zip(outcome("fused", mesh, **case), outcome("xla", None, **case), strict=True):
        np.testing.assert_allclose(kernel, plain, atol=2e-5)


def test_splash_with_few_rows_at_a_time(tpu, monkeypatch):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(fused, "_RESIDUAL_BYTES", 3 * HEADS * 256 * 128 * 4)  # three rows, then one
    for kernel, plain in zip(outcome("fused", mesh), outcome("xla", None), strict=True):
        np.testing.assert_allclose(kernel, plain, atol=2e-5)


def test_a_model_with_fused_attention_gives_the_same_results(tpu, monkeypatch):
    """With a scan, remat and a mesh, alternating windows and arbitrary values in the padding; in float32."""
    monkeypatch.setattr(fused, "unsupported_reason", lambda config, mesh, dtype: None if mesh else "no mesh")
    config, mesh = from_hf(FIELDS), make_mesh(2, 2, 2)
    model = Model(config, mesh=mesh, attention="fused")
    plain = dataclasses.replace(model, mesh=None)  # as diagnostics use it
    params = plain.init(jax.random.key(1))
    spread = jax.device_put(params, shardings(config, mesh))
    lengths = np.array([140, 77, 140, 9])
    tokens = np.random.default_rng(3).integers(0, 22, (4, 140)).astype(np.int32)
    seen = jnp.asarray(np.arange(140) < lengths[:, None], jnp.float32)[..., None]

    def loss(model, params, tokens):
        return jnp.sum(seen * jnp.sin(model.hidden(params, tokens)))

    value, gradient = jax.jit(jax.value_and_grad(partial(loss, plain)))(params, tokens)
    rubbish = np.where(np.arange(140) < lengths[:, None], tokens, 21)
    got, got_gradient = jax.jit(jax.value_and_grad(partial(loss, model)))(spread, rubbish)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4), got_gradient, gradient)

    apart, caches = jax.jit(plain.for_decoding)(params), []
    for one, weights in ((plain, apart), (model, jax.jit(model.for_decoding)(spread))):
        hidden, cache = jax.jit(one.prefill)(weights, tokens, lengths)
        caches.append([np.asarray(x)[3, ..., :9, :] for x in (hidden, *cache.keys, *cache.values)])
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), *caches)


def test_auto_uses_the_kernel_for_long_rows(tpu):
    mesh = make_mesh(2, 2, 2)

    def kernels(implementation, slots, batch=BATCH):
        def attention(query, key, value):
            spec = AttentionSpec((None,), 1.0, None, implementation, mesh)
            return attend(query, key, value, jnp.arange(slots)[None, :], None, spec)

        arrays = [jnp.zeros((batch, slots, HEADS, WIDTH)), *jnp.zeros((2, batch, GROUPS, slots, WIDTH))]
        return "pallas_call" in str(jax.make_jaxpr(attention)(*arrays))

    assert kernels("auto", 128) and not kernels("auto", 127) and kernels("fused", 127) and not kernels("xla", 128)
    assert not kernels("auto", 128, batch=3)
    with pytest.raises(ValueError, match="3 rows do not divide by data x fsdp = 4"):
        kernels("fused", 128, batch=3)


def test_blocks_add_at_most_an_eighth():
    assert fused.blocks(36864) == (512, 36864) and fused.blocks(2112) == (256, 2304)
    assert fused.blocks(576) == (128, 640) and fused.blocks(130) == (128, 256)


@pytest.mark.parametrize("window", [None, 37])
def test_the_cudnn_call_equals_plain_attention(window, monkeypatch):
    """The same call with JAX's plain implementation of the function, which has the same arguments."""
    called = []
    original = jax.nn.dot_product_attention

    def instead(*arrays, implementation, **options):
        called.append(implementation)
        return original(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(fused, "platform", lambda mesh: "gpu")
    kernel = outcome("fused", make_mesh(2, 1, 2, devices=jax.devices()[:4]), windows=(window,))
    assert called == ["cudnn"]
    for a, b in zip(kernel, outcome("xla", None, windows=(window,)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_unsupported_models_are_an_error_or_use_plain_attention(monkeypatch):
    gemma = {"query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window"}
    plain = {name: value for name, value in FIELDS.items() if name not in gemma} | {"model_type": "qwen3"}
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")

    def why(dtype="bfloat16", capability="9.0", platform="gpu", **fields):
        device.platform, device.compute_capability = platform, capability
        mesh = types.SimpleNamespace(devices=np.array([device]))
        return fused.unsupported_reason(from_hf(plain | fields), mesh, dtype)

    assert why() is None and why(platform="tpu") is None
    assert "multiply bfloat16, not float32" in why(platform="tpu", dtype="float32")
    assert "multiple of 64, not 80" in why(platform="tpu", head_dim=80)
    assert "multiply bfloat16, not float32" in why(dtype="float32")
    assert "up to 128, not 256" in why(capability="8.6", head_dim=256) and why(head_dim=256) is None
    assert "multiple of 8 up to 256, not 84" in why(head_dim=84)
    assert "8.0 or later" in why(capability="7.5") and "8.0 or later" in why(capability="gfx942")
    assert "no soft cap" in why(**FIELDS) and why(platform="tpu", **FIELDS) is None
    with pytest.raises(UserError, match=r"config\.compute\.attention is 'fused'; only TPUs"):
        Model(from_hf(FIELDS), mesh=make_mesh(), attention="fused")
