"""Attention in chunks and halves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.models import attention
from camopd_jax.models.attention import attend
from camopd_jax.models.config import AttentionSpec
from camopd_jax.runtime.mesh import make_mesh


def arrays(batch, length, heads, groups, width, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, length, heads, width)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, groups, length, width)).astype(np.float32)
    return query, key, value


def test_chunks_depend_on_the_rows_and_heads_of_one_chip(monkeypatch):
    """8 rows of 4 heads and 37 keys: a device of mesh (2, 2, 2) has 2 rows of 2 heads, an eighth of all scores."""
    monkeypatch.setattr(attention, "_MAX_SCORES", 8 * 4 * 37 * 5)
    positions = jnp.arange(37)[None, :]

    def trips(mesh):
        def attention(*qkv):
            return attend(*qkv, positions, positions, AttentionSpec((None,), scale=1.0, mesh=mesh))

        jaxpr = jax.make_jaxpr(attention)(*arrays(8, 37, 4, 2, 6))
        return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]

    assert trips(None) == [8] == trips(make_mesh(1, 1, 1, devices=jax.devices()[:1]))  # ceil(37 / 5)
    assert trips(make_mesh(4, 1, 2)) == trips(make_mesh(2, 2, 2)) == []  # 40 queries at a time
    monkeypatch.setattr(attention, "_MAX_SCORES", 8 * 4 * 37 * 2)
    assert trips(make_mesh(2, 2, 2)) == [3]  # ceil(37 / 16)
    assert trips(make_mesh(2, 4, 1)) == [3] and trips(make_mesh(1, 2, 4)) == [3]


@pytest.mark.parametrize("length, window", [(128, None), (131, None), (131, 40), (130, 100)])
def test_attention_by_halves_equals_plain_attention(length, window):
    query, key, value = arrays(2, length, 4, 2, 6)
    positions = jnp.arange(length)[None, :]

    def gradients(key_positions, softcap=None):
        def loss(*qkv):
            spec = AttentionSpec((window,), scale=0.5, softcap=softcap)
            return jnp.sum(jnp.sin(attend(*qkv, positions, key_positions, spec)))

        return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

    for softcap in (None, 3.0):
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-4), gradients(None, softcap), gradients(positions, softcap)
        )
    products = str(jax.make_jaxpr(lambda: gradients(None))()).count("dot_general")
    assert products == 2 * str(jax.make_jaxpr(lambda: gradients(positions))()).count("dot_general")
