"""The filters against numpy, and frequencies of samples against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.config.schema import Sampling
from camopd_jax.rollout.sampling import filtered, row_keys, sample

LOGITS = np.random.default_rng(0).normal(0, 2, (37, 23)).astype(np.float32)


def kept(sampling: Sampling, logits: np.ndarray = LOGITS) -> np.ndarray:
    return np.isfinite(np.asarray(filtered(jnp.asarray(logits), sampling)))


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_top_k_keeps_the_k_most_likely_tokens():
    rank = np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)
    for k in (1, 5, 22):
        np.testing.assert_array_equal(kept(Sampling(top_k=k)), rank < k)
    assert kept(Sampling(top_k=1000)).all()


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    for row, keep in zip(softmax(LOGITS.astype(np.float64)), kept(Sampling(top_p=p)), strict=True):
        total, expected = 0.0, np.zeros(len(row), bool)
        for token in np.argsort(-row):
            expected[token] = True
            total += row[token]
            if total >= p:
                break
        np.testing.assert_array_equal(keep, expected)


def test_min_p_is_relative_to_the_highest_probability():
    p = softmax(LOGITS.astype(np.float64))
    np.testing.assert_array_equal(kept(Sampling(min_p=0.1)), p >= 0.1 * p.max(-1, keepdims=True))


def test_equal_tokens_are_treated_alike():
    logits = np.array([[1.0, 1.0, 0.0]], np.float32)
    for sampling in (Sampling(top_k=1), Sampling(top_p=0.1), Sampling(min_p=0.9)):
        np.testing.assert_array_equal(kept(sampling, logits), [[True, True, False]])


def test_greedy_takes_the_most_likely_token():
    tokens = sample(jnp.asarray(LOGITS), jax.random.split(jax.random.key(0), 37), Sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_distribution(temperature):
    """Chi-square over 11 tokens and 20,000 samples: with 10 degrees of freedom, P(> 29.6) = 0.001."""
    logits = jnp.asarray(LOGITS[0, :11])
    keys = row_keys(0, jnp.int32(0), jnp.arange(20_000))
    settings = Sampling(temperature=temperature)
    drawn = jax.jit(sample, static_argnums=2)(jnp.broadcast_to(logits, (20_000, 11)), keys, settings)
    expected = 20_000 * softmax(np.asarray(logits, np.float64) / temperature)
    observed = np.bincount(np.asarray(drawn), minlength=11)
    assert np.sum((observed - expected) ** 2 / expected) < 29.6


def test_row_keys_depend_on_seed_step_and_prompt():
    def bits(seed, step, index):
        return tuple(np.asarray(jax.random.key_data(row_keys(seed, jnp.int32(step), jnp.array([index]))))[0])

    assert len({bits(s, t, i) for s in (0, 1) for t in (0, 1) for i in (0, 1)}) == 8
    whole = jax.random.key_data(row_keys(7, jnp.int32(2), jnp.array([4, 9, 1])))
    np.testing.assert_array_equal(whole[1], jax.random.key_data(row_keys(7, jnp.int32(2), jnp.array([9])))[0])
