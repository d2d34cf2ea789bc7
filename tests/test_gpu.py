"""What only a GPU can show; `benchmarks/gpu.sh` runs the tests marked `gpu` there. On a CPU, what it can show of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.models.attention import attend
from camopd_jax.models.config import AttentionSpec
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.runtime.offload import HOST, OffloadSlot

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("window", [None, 37])
def test_cudnns_attention_is_as_near_to_float32_as_plain_attention_is(window):
    """The output and the gradients with respect to queries, keys and values."""
    random, mesh = np.random.default_rng(0), make_mesh(devices=jax.devices()[:1])
    arrays = [random.normal(size=(4, 256, heads, 64)) for heads in (4, 2, 2, 4)]

    def outcome(implementation, dtype):
        query, key, value, back = (jnp.asarray(array, dtype) for array in arrays)
        spec = AttentionSpec((window,), 0.125, None, implementation, mesh)

        def attention(*qkv):
            return attend(*qkv, jnp.arange(256)[None, :], None, spec, 0)

        result, pull = jax.vjp(attention, query, key, value)
        return [np.asarray(array, np.float32) for array in (result, *pull(back))]

    with jax.default_matmul_precision("highest"):
        exact = outcome("xla", "float32")
    of_kernel, of_plain = outcome("fused", "bfloat16"), outcome("xla", "bfloat16")
    for kernel, plain, true in zip(of_kernel, of_plain, exact, strict=True):
        assert np.abs(kernel - true).max() < 2 * np.abs(plain - true).max()


def test_arrays_return_from_host_memory_as_they_were():
    arrays = {name: jnp.asarray(np.random.default_rng(i).normal(size=(65, 33))) for i, name in enumerate("ab")}
    before, slot = jax.tree.map(np.asarray, arrays), OffloadSlot()
    before = jax.tree.map(np.copy, before)
    slot.put(arrays)
    assert all(array.is_deleted() for array in arrays.values())
    assert {array.sharding.memory_kind for array in slot._tree.values()} == {HOST}
    after = slot.take()
    assert slot.is_empty
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name])
