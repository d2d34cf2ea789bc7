"""The weights of Eq 9, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.config.schema import Method
from camopd_jax.method.objectives import OBJECTIVES
from camopd_jax.method.weights import importance, token_weights
from camopd_jax.types import Batch, LogProbs, Prompts, Rollout, Selection

LENGTHS = np.array([2, 3])
STUDENT = np.array([[-1.0, -2.0, 0.0], [-0.5, -1.0, -3.0]], np.float32)
TEACHER = np.array([[-0.5, -4.0, 0.0], [-0.5, -0.5, -1.0]], np.float32)
SAMPLER = np.array([[-1.0, -2.5, 0.0], [-0.5, -1.0, -1.0]], np.float32)
GAP = np.array([[0.5, -2.0, 0.0], [0.0, 0.5, 2.0]])
SAMPLED_TOKEN = OBJECTIVES["sampled_token"]()


def case(selected=(1.0, 1.0), teacher=TEACHER):
    rollout = Rollout(
        jnp.zeros((2, 3), jnp.int32), jnp.asarray(LENGTHS), jnp.asarray(SAMPLER), jnp.zeros(2), jnp.ones(2, bool)
    )
    order = jnp.argsort(-jnp.asarray(selected)).astype(jnp.int32)
    selection = Selection(jnp.ones(2), order, jnp.int32(sum(selected)), jnp.asarray(selected, jnp.float32))
    prompts = Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    return Batch(prompts, jnp.arange(2), rollout, LogProbs(jnp.asarray(STUDENT), jnp.asarray(teacher)), selection)


def weights(selected=(1.0, 1.0), scale=1.0, objective=SAMPLED_TOKEN, teacher=TEACHER, **method):
    return token_weights(case(selected, teacher), Method(**method), objective, scale)


def test_sequence_mean_then_mean_over_selected_answers():
    np.testing.assert_allclose(
        weights(scale=2.0), [[0.5 / 4 * 2, -2.0 / 4 * 2, 0], [0, 0.5 / 6 * 2, 2.0 / 6 * 2]], rtol=1e-6
    )


def test_unselected_answers_have_weight_zero():
    np.testing.assert_allclose(weights(selected=(0.0, 1.0)), [[0, 0, 0], [0, 0.5 / 3, 2.0 / 3]], rtol=1e-6)


def test_mean_over_all_selected_tokens():
    np.testing.assert_allclose(weights(normalise="token"), GAP / 5, rtol=1e-6)
    np.testing.assert_allclose(weights(selected=(0.0, 1.0), normalise="token"), [[0, 0, 0], GAP[1] / 3], rtol=1e-6)


def test_the_clip_is_applied_before_the_scale():
    np.testing.assert_allclose(SAMPLED_TOKEN.coefficient(case().log_probs, 1.0), [[0.5, -1.0, 0.0], [0.0, 0.5, 1.0]])
    np.testing.assert_allclose(weights(scale=2.0, advantage_clip=1.0)[0], [0.5 / 4 * 2, -1.0 / 4 * 2, 0], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"sampled_token", "selectkd"}))
def test_other_objectives_have_no_advantage(name):
    ones = [[2.0 / 4, 2.0 / 4, 0], [2.0 / 6] * 3]
    np.testing.assert_allclose(weights(scale=2.0, objective=OBJECTIVES[name](), advantage_clip=0.1), ones, rtol=1e-6)


def test_the_gate_is_the_ratio_inside_and_zero_outside():
    batch = case()
    ratio = np.exp(STUDENT - SAMPLER)  # 1, e^0.5 = 1.65; 1, 1, e^-2 = 0.14
    for gate, kept in (((0.5, 2.0), np.where(ratio < 0.5, 0, ratio)), ((0.1, 1.2), np.where(ratio > 1.2, 0, ratio))):
        np.testing.assert_allclose(importance(batch.log_probs, batch.rollout, gate), kept, rtol=1e-6)
    np.testing.assert_array_equal(importance(batch.log_probs, batch.rollout, None), 1)
    gated = weights(importance_gate=(0.5, 2.0))
    np.testing.assert_allclose(gated[0], [0.5 / 4, -2 * np.exp(0.5) / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(gated[1], [0, 0.5 / 6, 0], rtol=1e-6)


def test_the_published_example_of_the_gate():
    """MiMo's gate [.5, 2] with five ratios."""
    ratios = np.log(np.array([[0.4, 0.5, 1.3, 2.0, 2.5]], np.float32))
    rollout = Rollout(None, None, jnp.zeros((1, 5)), None, None)
    got = importance(LogProbs(jnp.asarray(ratios), None), rollout, (0.4999, 2.0001))
    np.testing.assert_allclose(got, [[0, 0.5, 1.3, 2.0, 0]], rtol=1e-6)


@pytest.mark.parametrize("spoiled", [np.nan, np.inf])
def test_padding_and_unselected_rows_have_no_effect(spoiled):
    teacher = np.array(TEACHER)
    teacher[0, 2] = teacher[1] = spoiled
    np.testing.assert_array_equal(weights((1.0, 0.0), teacher=teacher), weights((1.0, 0.0)))
