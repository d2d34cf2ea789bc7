"""The weights of Eq 9, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.config.schema import Method, Phase
from camopd_jax.method.token_weights import advantage, importance, token_weights
from camopd_jax.types import Rollout, LogProbs, Selection

LENGTHS = np.array([2, 3])
STUDENT = np.array([[-1.0, -2.0, 0.0], [-0.5, -1.0, -3.0]], np.float32)
TEACHER = np.array([[-0.5, -4.0, 0.0], [-0.5, -0.5, -1.0]], np.float32)
SAMPLER = np.array([[-1.0, -2.5, 0.0], [-0.5, -1.0, -1.0]], np.float32)
GAP = np.array([[0.5, -2.0, 0.0], [0.0, 0.5, 2.0]])


def case(chosen=(1.0, 1.0)):
    rollout = Rollout(
        jnp.zeros((2, 3), jnp.int32), jnp.asarray(LENGTHS), jnp.asarray(SAMPLER), jnp.zeros(2), jnp.ones(2, bool)
    )
    order = jnp.argsort(-jnp.asarray(chosen)).astype(jnp.int32)
    selection = Selection(jnp.ones(2), order, jnp.int32(sum(chosen)), jnp.asarray(chosen, jnp.float32))
    return LogProbs(jnp.asarray(STUDENT), jnp.asarray(TEACHER)), rollout, selection


def weights(chosen=(1.0, 1.0), scale=1.0, **method):
    return token_weights(*case(chosen), Method(**method), Phase("absolute_gap", 0.8, scale))


def test_sequence_mean_then_mean_over_the_selected():
    np.testing.assert_allclose(
        weights(scale=2.0), [[0.5 / 4 * 2, -2.0 / 4 * 2, 0], [0, 0.5 / 6 * 2, 2.0 / 6 * 2]], rtol=1e-6
    )


def test_an_answer_that_was_not_selected_weighs_nothing():
    np.testing.assert_allclose(weights(chosen=(0.0, 1.0)), [[0, 0, 0], [0, 0.5 / 3, 2.0 / 3]], rtol=1e-6)


def test_token_mean_over_all_selected():
    np.testing.assert_allclose(weights(normalise="token"), GAP / 5, rtol=1e-6)
    np.testing.assert_allclose(weights(chosen=(0.0, 1.0), normalise="token"), [[0, 0, 0], GAP[1] / 3], rtol=1e-6)


def test_the_clip_acts_before_the_scale():
    scores, *_ = case()
    np.testing.assert_allclose(advantage(scores, 2.0, 1.0), [[1.0, -2.0, 0.0], [0.0, 1.0, 2.0]])


def test_the_gate_keeps_the_ratio_inside_and_nothing_outside():
    scores, rollout, _ = case()
    ratio = np.exp(STUDENT - SAMPLER)  # 1, e^0.5 = 1.65; 1, 1, e^-2 = 0.14
    np.testing.assert_allclose(importance(scores, rollout, (0.5, 2.0)), np.where(ratio < 0.5, 0, ratio), rtol=1e-6)
    np.testing.assert_allclose(importance(scores, rollout, (0.1, 1.2)), np.where(ratio > 1.2, 0, ratio), rtol=1e-6)
    np.testing.assert_array_equal(importance(scores, rollout, None), 1)
    gated = weights(importance_gate=(0.5, 2.0))
    np.testing.assert_allclose(gated[0], [0.5 / 4, -2 * np.exp(0.5) / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(gated[1], [0, 0.5 / 6, 0], rtol=1e-6)


@pytest.mark.parametrize("spoiled", [np.nan, np.inf])
def test_padding_and_unselected_rows_may_hold_anything(spoiled):
    scores, rollout, selection = case(chosen=(1.0, 0.0))
    teacher = np.array(TEACHER)
    teacher[0, 2] = teacher[1] = spoiled
    spoiled_weights = token_weights(
        dataclasses.replace(scores, teacher=jnp.asarray(teacher)), rollout, selection, Method(), Phase()
    )
    np.testing.assert_array_equal(spoiled_weights, weights(chosen=(1.0, 0.0)))
