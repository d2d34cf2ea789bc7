"""The precision of matrix products, read from programs before compilation: a CPU multiplies float32 exactly anyway."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.models.config import from_hf
from camopd_jax.models.products import multiply_to_float32
from camopd_jax.models.transformer import Model

PRODUCT = re.compile(r".*(?:stablehlo\.dot_general|chlo\.ragged_dot|jit\(ragged_dot).*")
DENSE = dict(
    model_type="qwen3",
    vocab_size=44,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


def products(fields: dict, dtype: str) -> list[str]:
    """The matrix products of a model's log-probabilities and their gradient, as lines of the program."""
    model = Model(from_hf(fields), dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jnp.ones((2, 8), jnp.int32)

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(model.logits(params, model.hidden(params, tokens)))[..., 0])

    return [line for line in jax.jit(jax.grad(loss)).lower(params).as_text().splitlines() if PRODUCT.match(line)]


@pytest.mark.parametrize(
    "changes", [{}, dict(model_type="qwen3_moe", moe_intermediate_size=10, num_experts=5, num_experts_per_tok=2)]
)
def test_float32_is_multiplied_as_float32_on_every_platform(changes):
    of_model = products(DENSE | changes, "float32")
    assert len(of_model) > 30 and all("precision = [HIGHEST, HIGHEST]" in line for line in of_model)


def test_bfloat16_is_never_widened():
    """All operands are bfloat16, in the backward pass too, where sums in float32 come in."""
    of_model = products(DENSE, "bfloat16")
    operands = [re.search(r": \((.*)\) ->", line).group(1) for line in of_model]
    assert len(operands) > 30 and not [of for of in operands if "f32" in of.replace("bf16", "")]


def test_the_heads_gradient_is_as_exact_as_bfloat16_allows():
    """Against float64, the error of each entry is within a few of bfloat16's roundings, 2^-9 of the largest term."""
    random = np.random.default_rng(0)
    x, kernel, gradient = (
        jnp.asarray(random.normal(size=shape), dtype)
        for shape, dtype in (((32, 24), jnp.bfloat16), ((24, 50), jnp.bfloat16), ((32, 50), jnp.float32))
    )
    _, pull = jax.vjp(lambda x, kernel: multiply_to_float32("nd,dv->nv", x, kernel), x, kernel)
    exact = [np.asarray(array, np.float64) for array in (x, kernel, gradient)]
    expected = exact[2] @ exact[1].T, exact[0].T @ exact[2]
    for got, want in zip(pull(gradient), expected, strict=True):
        assert got.dtype == jnp.bfloat16
        scale = np.linalg.norm(want) / np.sqrt(want.size)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2**-7 * scale)
