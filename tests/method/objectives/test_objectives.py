"""Objectives with a vocabulary of four words, to six digits; names and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from camopd_jax.errors import UserError
from camopd_jax.method.objectives import OBJECTIVES, TeacherReading, objective
from camopd_jax.types import LogProbs

STUDENT, TEACHER = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.5, 0.15, 0.10])
Z, T = jnp.log(jnp.asarray(STUDENT, jnp.float32)), jnp.log(jnp.asarray(TEACHER, jnp.float32))
NAMED = "config.branches.recovery.objective"

# Value, and gradient with respect to the student's logits.
PINNED = {
    "reverse_kl": (0.158669, (0.267239, -0.200848, -0.023800, -0.042591)),
    "forward_kl": (0.151441, (0.25, -0.2, 0, -0.05)),
    "jsd(beta=0.1)": (0.013614, (0.022398, -0.017836, -0.000205, -0.004357)),
    "jsd": (0.038118, (0.062605, -0.048742, -0.002795, -0.011068)),
    "jsd(beta=0.9)": (0.014124, (0.023601, -0.017875, -0.001887, -0.003838)),
    "teacher_top_k(k=2)": (0.177119, (0.282181, -0.282181, 0, 0)),
    "corrected_top_k(k=2)": (0.143326, (0.249911, -0.211245, -0.028999, -0.009666)),
    "binned_top_k(k=2)": (0.148697, (0.272225, -0.197857, -0.055776, -0.018592)),
    "binned_top_k(k=2, direction='forward')": (0.137912, (0.25, -0.2, -0.0375, -0.0125)),
    "tide_deficit(k=2)": (0.397183, (0.166667, -0.366667, 0.15, 0.05)),
    "student_top_k(k=2)": (0.177119, (0.282181, -0.282181, 0, 0)),  # of both models, words 0 and 1 are the top 2
}
EVERY_WORD = [  # a top-K objective at K = V or beyond, and the objective over the full vocabulary that it equals
    ("teacher_top_k(k=4)", "reverse_kl"),
    ("corrected_top_k", "reverse_kl"),
    ("binned_top_k(k=4)", "reverse_kl"),
    ("binned_top_k(k=9, direction='forward')", "forward_kl"),
    ("tide_deficit(k=4)", "forward_kl"),
    ("student_top_k(k=16)", "reverse_kl"),
]


def loss(name, logits, word=0, teacher=T):
    """The loss of one token, with its coefficient."""
    of = objective(name, NAMED)
    tokens = jnp.int32(word)
    gap = LogProbs(jax.nn.log_softmax(Z)[None, None, word], jax.nn.log_softmax(teacher)[None, None, word])
    record = of.read(teacher, {"tokens": tokens}) | ({"teacher_logits": teacher} if of.teacher_logits else {})
    return of.coefficient(gap, None)[0, 0] * of.loss(logits, {"tokens": tokens} | record)


@pytest.mark.parametrize("name", PINNED)
def test_pinned_values_and_gradients(name):
    value, gradient = jax.value_and_grad(lambda z: loss(name, z))(Z)
    np.testing.assert_allclose(value, PINNED[name][0], atol=1e-5)
    np.testing.assert_allclose(gradient, PINNED[name][1], atol=1e-5)
    check_grads(lambda z: loss(name, z), (Z,), order=1, modes=["rev"], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("name, full", EVERY_WORD)
def test_the_top_k_of_all_words_is_the_full_vocabulary(name, full):
    value, gradient = jax.value_and_grad(lambda z: loss(name, z))(Z)
    np.testing.assert_allclose(value, PINNED[full][0], atol=1e-5)
    np.testing.assert_allclose(gradient, PINNED[full][1], atol=1e-5)


def test_equal_models_have_no_gradient():
    """In particular none out of the top K, as the truncated sum would have: (0.1, 0.06, -0.12, -0.04) for k = 2."""
    for name in PINNED:
        if name != "tide_deficit(k=2)":  # its student gives probability to tokens outside the set
            value, gradient = jax.value_and_grad(lambda z, n=name: loss(n, z, teacher=Z))(Z)
            np.testing.assert_allclose([value, *gradient], 0, atol=1e-6)


def test_the_student_chooses_its_own_top_k():
    """Words 0 and 3 of this student, where the teacher's are 1 and 0."""
    value = loss("student_top_k(k=2)", jnp.log(jnp.array([0.5, 0.05, 0.1, 0.35])))
    pair, of_teacher = np.array([0.5, 0.35]) / 0.85, np.array([0.25, 0.10]) / 0.35
    np.testing.assert_allclose(value, np.sum(pair * np.log(pair / of_teacher)), atol=1e-6)


def test_what_a_top_k_objective_stores():
    record = TeacherReading(objective("binned_top_k(k=3)", NAMED))(T[None], {"tokens": jnp.array([1])})
    assert record["top_ids"].tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(record["top_log_probs"], np.log([[0.5, 0.25, 0.15]]), atol=1e-6)
    np.testing.assert_allclose(record["rest"], np.log([0.1]), atol=1e-6)
    assert set(TeacherReading(objective("teacher_top_k", NAMED))(T, {"tokens": jnp.array(1)})) == {
        "log_prob", "top_ids", "top_log_probs"
    }  # fmt: skip


def test_a_small_rest_is_not_rounded_away():
    """`1 - sum` of two float32 probabilities would be 0."""
    confident = jnp.array([20.0, 1.0, 0.0, 0.0])
    record = objective("binned_top_k(k=2)", NAMED).read(confident, {})
    np.testing.assert_allclose(record["rest"], np.log(2) - 20, rtol=1e-6)


@pytest.mark.parametrize("shift", [7.0, -300.0])
@pytest.mark.parametrize("name", PINNED)
def test_shifted_logits_and_impossible_words(name, shift):
    np.testing.assert_allclose(loss(name, Z + shift, teacher=T - shift), PINNED[name][0], atol=1e-4)
    cut = jnp.full(1, -1e9)
    value, gradient = jax.value_and_grad(lambda z: loss(name, z, teacher=jnp.concatenate([T, cut])))(
        jnp.concatenate([Z, cut])
    )
    np.testing.assert_allclose(value, PINNED[name][0], atol=1e-5)
    np.testing.assert_allclose(gradient, [*PINNED[name][1], 0], atol=1e-5)


@pytest.mark.parametrize(
    "word, gradient",
    [(0, (0.346574, -0.207944, -0.103972, -0.034657)), (1, (0.255413, -0.357578, 0.076624, 0.025541))],
)
def test_the_sampled_token(word, gradient):
    np.testing.assert_allclose(jax.grad(lambda z: loss("sampled_token", z, word))(Z), gradient, atol=1e-5)


def test_the_sampled_token_is_the_reverse_kl_on_average():
    gradients = [jax.grad(lambda z, w=word: loss("sampled_token", z, w))(Z) for word in range(4)]
    np.testing.assert_allclose(STUDENT @ np.asarray(gradients), PINNED["reverse_kl"][1], atol=1e-5)


@pytest.mark.parametrize("options, factor", [("k=1", 0), ("k=2", 1), ("k=1, rejected=0.3", 0.3)])
def test_selectkd_accepts_the_students_first_word_in_the_teachers_top_k(options, factor):
    """The student's most likely word is the teacher's second one."""
    gradient = jax.grad(lambda z: loss(f"selectkd({options})", z, 1))(Z)
    np.testing.assert_allclose(gradient, factor * np.array([0.255413, -0.357578, 0.076624, 0.025541]), atol=1e-5)


def test_cross_entropy_does_not_depend_on_the_teacher():
    value, gradient = jax.value_and_grad(lambda z: loss("cross_entropy", z, 1))(Z)
    np.testing.assert_allclose(value, -np.log(0.3), atol=1e-6)
    np.testing.assert_allclose(gradient, STUDENT - [0, 1, 0, 0], atol=1e-6)


def test_gradients_do_not_reach_the_teacher():
    for name in PINNED:
        gradient = jax.grad(lambda t, n=name: loss(n, Z, teacher=t))(T)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_reads_the_tokens_log_probability(name):
    reading = TeacherReading(OBJECTIVES[name]())
    record = reading(T[None], {"tokens": jnp.array([1])})
    np.testing.assert_allclose(record["log_prob"], [np.log(0.5)], atol=1e-6)
    assert hash(reading) == hash(TeacherReading(OBJECTIVES[name]())), "a static argument of compiled functions"


@pytest.mark.parametrize("name, keeps", [("sampled_token", False), ("reverse_kl", True), ("jsd", True),
                                         ("student_top_k", True), ("teacher_top_k", False)])  # fmt: skip
def test_only_losses_that_need_the_teachers_logits_store_hidden_states(name, keeps):
    assert TeacherReading(OBJECTIVES[name]()).keeps_hidden == keeps


@pytest.mark.parametrize(
    "text, message",
    [
        ("kl", "the objectives are sampled_token, cross_entropy, reverse_kl, forward_kl, jsd"),
        ("jsd(beta=1.0)", "beta is 1.0; give a number between 0 and 1"),
        ("jsd(alpha=.1)", "unexpected keyword argument 'alpha'"),
        ("jsd(0.1)", r"give a name, with options as in jsd\(beta=0.1\)"),
        ("jsd(beta=x)", "give a name"),
        ("", "give a name"),
        ("import os", "give a name"),
        ("teacher_top_k(k=0)", "k is 0; give a number of tokens, at least 1"),
        ("student_top_k(k=1.5)", "k is 1.5; give a number of tokens"),
        ("binned_top_k(direction='left')", "direction is 'left'; give 'reverse' or 'forward'"),
        ("selectkd(rejected=2)", "rejected is 2; give a factor between 0 and 1"),
        ("truncated_top_k(k=16)", "is not offered: it sums over the top K only.* give teacher_top_k"),
    ],
)
def test_invalid_names_and_options(text, message):
    with pytest.raises(UserError, match=rf"config\.branches\.recovery\.objective is .*{message}"):
        objective(text, NAMED)
