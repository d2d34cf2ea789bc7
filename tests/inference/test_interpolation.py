"""The weighted mean of two models' parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.inference.interpolation import interpolated
from camopd_jax.runtime.mesh import make_mesh, sharding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_hand(dtype):
    """A mean in bfloat16 is the exact one, rounded once."""
    general = {"a": jnp.array([1.0, 1.0078125], dtype), "b": {"c": jnp.array([[2.0]], "float32")}}
    specialised = {"a": jnp.array([5.0, 3.0], dtype), "b": {"c": jnp.array([[-4.0]], "float32")}}
    mean = interpolated(general, specialised, 0.75)
    exact = np.array([2.0, 0.75 * 1.0078125 + 0.75])  # 1.505859375
    assert mean["a"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(mean["a"], np.float64), np.asarray(jnp.asarray(exact, dtype), np.float64))
    np.testing.assert_array_equal(mean["b"]["c"], [[0.5]])
    assert interpolated(general, specialised, 0.0) is specialised
    np.testing.assert_array_equal(interpolated(general, specialised, 1.0)["a"], general["a"])


def test_any_mesh_gives_the_same_bits_and_keeps_the_shardings():
    keys = jax.random.split(jax.random.key(0))
    general, specialised = (np.asarray(jax.random.normal(key, (8, 12))) for key in keys)
    place = sharding(make_mesh(2, 4, 1), "vocab", "embed")
    alone = interpolated({"a": jnp.asarray(general)}, {"a": jnp.asarray(specialised)}, 0.1)
    spread = interpolated({"a": jax.device_put(general, place)}, {"a": jax.device_put(specialised, place)}, 0.1)
    assert spread["a"].sharding == place
    np.testing.assert_array_equal(spread["a"], alone["a"])
    np.testing.assert_allclose(alone["a"], 0.1 * general.astype(float) + 0.9 * specialised, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strength", [0.9, 0.5, 0.0])
def test_task_arithmetic_is_the_interpolation(strength):
    """The original plus `strength` of the task vector (arXiv 2212.04089), computed in float64."""
    random = np.random.default_rng(0)
    original = {name: random.normal(size=shape).astype(np.float32) for name, shape in (("a", (5, 7)), ("b", (3,)))}
    special = {
        name: array + 0.1 * random.normal(size=array.shape).astype(np.float32) for name, array in original.items()
    }
    task = {name: special[name].astype(float) - original[name].astype(float) for name in original}
    ours = interpolated(*(jax.tree.map(jnp.asarray, model) for model in (original, special)), 1 - strength)
    for name, array in ours.items():
        np.testing.assert_allclose(array, original[name] + strength * task[name], rtol=1e-6, atol=1e-7)
