import jax.numpy as jnp
import numpy as np

from camopd_jax.rollout.masks import length_mask, row_mean, token_mean

VALUES = jnp.array([[1.0, 3.0, jnp.nan], [5.0, 6.0, 7.0], [jnp.inf, 1.0, 1.0]])
LENGTHS = jnp.array([2, 3, 0])


def test_padding_does_not_count():
    np.testing.assert_array_equal(length_mask(LENGTHS, 3), [[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(row_mean(VALUES, LENGTHS), [2, 6, 0])
    np.testing.assert_allclose(token_mean(VALUES, LENGTHS), 22 / 5)


def test_means_of_no_tokens_are_zero():
    assert token_mean(VALUES, jnp.zeros(3, jnp.int32)) == 0
