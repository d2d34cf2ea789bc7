"""AdamW, clipping and schedules, against optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from camopd_jax.config.schema import Optimizer
from camopd_jax.method.optimizer import apply, averaged, init_state, learning_rate, project
from camopd_jax.runtime.mesh import make_mesh, sharding

CONFIG = Optimizer(learning_rate=0.1, weight_decay=0.01, b1=0.8, b2=0.9, eps=1e-4)


def params():
    rng = np.random.default_rng(0)
    return {
        "layer": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "norm": {"scale": rng.normal(size=3)},
    }


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@pytest.mark.parametrize("clip_norm, clipped", [(1.0, 1.0), (100.0, 0.0), (None, 0.0)])
def test_three_steps_equal_optax(clip_norm, clipped):
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    mask = {"layer": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    reference = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(0.1, b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.01, mask=mask),
    )
    ours = theirs = as_jax(params())
    moments, state = init_state(ours).moments["shared"], reference.init(theirs)
    for step in range(3):
        grads = jax.tree.map(lambda p, step=step: p * (step + 1.0) + 0.3, theirs)
        ours, moments, stats = apply(ours, moments, grads, jnp.float32(0.1), config, jnp.bool_(True))
        updates, state = reference.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        assert stats["grad_clipped"] == clipped
        np.testing.assert_allclose(stats["grad_norm"], optax.global_norm(grads), rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(
    "displacement, expected", [((-1.0, 0.5), (-1.0, 0.5)), ((1.0, -0.5), (0.0, -0.5)), ((0.0, 2.0), (0.0, 2.0))]
)
def test_a_displacement_does_not_climb_along_a_gradient(displacement, expected):
    for gradient in ((1.0, 0.0), (3.0, 0.0)):
        d, g = ({"a": jnp.float32(a), "b": jnp.float32(b)} for a, b in (displacement, gradient))
        np.testing.assert_allclose([*project(d, g).values()], expected, atol=1e-6)
    nothing = {"a": jnp.float32(0), "b": jnp.float32(0)}
    np.testing.assert_array_equal([*project(d, nothing).values()], displacement)


def test_warm_up_then_constant():
    config = Optimizer(learning_rate=0.4, warmup_steps=4)
    rates = [float(learning_rate(config, 100, jnp.int32(i))) for i in (0, 1, 3, 4, 99)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)


def test_cosine_falls_to_zero():
    config = Optimizer(learning_rate=0.4, schedule="cosine", warmup_steps=20)
    rates = [float(learning_rate(config, 100, jnp.int32(i))) for i in (19, 20, 60, 100)]
    np.testing.assert_allclose(rates, [0.4, 0.4, 0.2, 0.0], atol=1e-7)


def test_moments_are_float32_with_the_parameters_shardings():
    place = sharding(make_mesh(2, 2, 2), "embed", "heads")
    kernel = jax.device_put(jnp.ones((4, 6), jnp.bfloat16), place)
    state = init_state({"kernel": kernel}, ("recovery", "review"))
    moments = state.moments
    assert set(moments) == {"recovery", "review"}
    for adam in moments.values():
        for array in (adam.mu["kernel"], adam.nu["kernel"]):
            assert array.dtype == jnp.float32 and array.sharding == place
        assert len(adam.count.addressable_shards) == 8
    assert len(state.step.addressable_shards) == 8


def test_bfloat16_parameters_are_updated_in_float32():
    """A step that is too small for bfloat16 is lost when it is stored, not in the computation."""
    kernel = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    moments = init_state(kernel).moments["shared"]
    config = Optimizer(clip_norm=None, eps=0.0)
    moved, _, _ = apply(kernel, moments, {"kernel": jnp.ones((2, 2))}, jnp.float32(0.01), config, jnp.bool_(True))
    assert moved["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved["kernel"].astype(jnp.float32), jnp.float32(jnp.bfloat16(0.99)))


def test_the_average_by_hand():
    """Decay .5 and parameters 1, 3, then a step that is skipped: the average of 1 and 3 with weights 1/3 and 2/3."""
    average = {"kernel": jnp.full(2, 100.0)}
    for update, (value, finite) in enumerate([(1.0, True), (3.0, True), (9.0, False)], 1):
        params = {"kernel": jnp.full(2, value, jnp.bfloat16)}
        average = averaged(average, params, 0.5, jnp.int32(update), jnp.bool_(finite))
        np.testing.assert_allclose(average["kernel"], [1.0, 7 / 3, 7 / 3][update - 1], rtol=1e-6)
    state = init_state(params, average=True).replace(average=average)
    assert state.evaluated["kernel"].dtype == jnp.bfloat16 and average["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(state.evaluated["kernel"], jnp.bfloat16(7 / 3))


def test_the_average_begins_as_a_copy_with_the_parameters_shardings():
    place = sharding(make_mesh(2, 2, 2), "embed", "heads")
    kernel = jax.device_put(jnp.ones((4, 6)), place)
    state = init_state({"kernel": kernel}, average=True)
    assert state.average["kernel"].sharding == place and not init_state({"kernel": kernel}).average
    jax.jit(lambda state: state, donate_argnums=0)(state)  # no buffer is donated twice
