"""Token weights against numbers computed by hand, and on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import train_config

from camopd_jax.config.schema import Method
from camopd_jax.errors import UserError
from camopd_jax.method.objectives import OBJECTIVES, TeacherReading, objective
from camopd_jax.method.programs import weigh
from camopd_jax.method.setup import resolve
from camopd_jax.method.token_weights import WEIGHTS, Tokens, branch_weights
from camopd_jax.method.weights import token_weights
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.runtime.mesh import global_rows, make_mesh, sharding
from camopd_jax.types import Batch, LogProbs, Prompts, Rollout, Selection, TeacherRecord

STUDENT, TEACHER = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.5, 0.15, 0.10])
GAP = np.log(TEACHER / STUDENT)  # (-.693147, .510826, 0, .693147)


def tokens(gap, lengths=None, trained=None, **more):
    """A batch of answers with these gaps [B, T]; the student's log-probabilities are 0."""
    gap = jnp.atleast_2d(jnp.asarray(gap, jnp.float32))
    trained = jnp.ones(gap.shape, bool) if trained is None else jnp.asarray(trained, bool)
    lengths = jnp.full(len(gap), gap.shape[1]) if lengths is None else jnp.asarray(lengths)
    values = {"ids": None, "log_probs": LogProbs(jnp.zeros(gap.shape), gap), "record": {}, "keys": None}
    return Tokens(trained=trained, lengths=lengths, **values | more)


def weights(*texts, of="sampled_token"):
    config = train_config({"weights": texts, "objective": of})
    return branch_weights(config, "recovery", objective(of, "objective"))


def applied(text, gap, **batch):
    of = tokens(gap, **batch)
    return weights(text)[0].apply(of.log_probs.gap, of)


# ------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "text, gap, expected",
    [
        ("top_d", GAP, (-0.287682, 0.287682, 0, 0.405465)),
        ("top_d(alpha=0.5)", [-1e4], [-0.693147]),
        ("reopold(lam=0.17)", [-5.0, -1.6, -1.5, 3.0], (-1.585627, -1.585627, -1.5, 3.0)),
        ("tide_excess(share=1.0)", GAP, (-0.585786, 0, 0, 0)),
        ("tide_excess(share=0.25)", [-0.5, -2.0, -1.0, 3.0], (0, 2 * np.expm1(-1.0), 0, 0)),
        ("tide_excess(share=0.75)", [-0.5, 2.0, 1.0, 3.0], (2 * np.expm1(-0.25), 0, 0, 0)),
        ("iw_opd", [-0.5, 0.1, -0.2, 0.2], (-0.5 * 1.5, 0.1 * 1.25, -0.2 * 1.2, 0.2 * 1.1)),
        ("iw_opd", [0.0, 0.0], (0, 0)),
        ("hardest(share=0.25)", [-0.5, 0.1, -0.2, 0.2], (-0.5 * 4, 0, 0, 0)),
        ("hardest(share=0.5)", [-0.5, 0.1, -0.2, 0.2], (-0.5 * 4 / 3, 0, -0.2 * 4 / 3, 0.2 * 4 / 3)),  # a tie
        ("hardest(share=1.0)", [-0.5, 0.1, -0.2, 0.2], (-0.5, 0.1, -0.2, 0.2)),
    ],
)
def test_pinned_values(text, gap, expected):
    np.testing.assert_allclose(applied(text, gap)[0], expected, atol=1e-5)


def test_the_overlong_penalty():
    lengths = [16_384, 18_432, 20_480, 30_000]
    got = applied("overlong", np.full((4, 1), 0.25), lengths=lengths)
    np.testing.assert_allclose(got[:, 0], [0.25, 0.25 - 0.5, 0.25 - 1, 0.25 - 1], atol=1e-6)


def test_the_control_without_a_teacher():
    """A fifth of ten tokens; gaps have no effect."""
    student = jnp.log(jnp.array([[0.9, 0.2, 0.5, 0.3, 0.6], [0.01, 0.7, 0.8, 0.4, 0.6]]))
    got = applied("unlikely", np.zeros((2, 5)), log_probs=LogProbs(student, jnp.full((2, 5), 7.0)))
    np.testing.assert_array_equal(got, [[0, -0.5, 0, 0, 0], [-0.5, 0, 0, 0, 0]])


def test_excluded_ids():
    got = applied("exclude(tokens=(7, 2))", [1.0, -1.0, 0.5], ids=jnp.array([[7, 3, 2]]))
    np.testing.assert_array_equal(got, [[0, -1, 0]])


def test_shares_are_of_the_trained_tokens():
    """Of the second answer, which is not selected, and of the padding, larger values do not count."""
    gap, trained = [[-0.5, -1.0, -9.0], [-8.0, -8.0, -8.0]], [[True, True, False], [False] * 3]
    for text in ("tide_excess(share=0.5)", "hardest(share=0.5)"):
        got = np.asarray(applied(text, gap, trained=trained))
        assert got[0, 0] == 0 and got[0, 1] != 0
    np.testing.assert_allclose(applied("iw_opd", gap, trained=trained)[0, :2], [-0.5 * 1.5, -1 * (1 + 0.5 * 2 / 3)])


# -------------------------------------------------------------------------------- the random mask


def kept(rows, seed=0, step=0):
    """The mask of UC-MOPD of `rows` answers with the four words, bool[rows, 4]."""
    (weight,) = weights("uc_mopd")
    reading = TeacherReading(OBJECTIVES["sampled_token"](), (weight,))
    record = reading(jnp.broadcast_to(jnp.log(TEACHER), (rows, 4, 4)), {"tokens": jnp.tile(jnp.arange(4), (rows, 1))})
    teacher = record.pop("log_prob")
    of = tokens(np.tile(GAP, (rows, 1)), record=record, keys=row_keys(seed, jnp.int32(step), jnp.arange(rows)))
    of = of.replace(log_probs=LogProbs(teacher - of.log_probs.gap, teacher))
    np.testing.assert_allclose(record["entropy"], np.full((rows, 4), 1.207974), atol=1e-5)
    np.testing.assert_allclose(weight.probability(of)[0], [0.163326, 1, 0, 0.334670], atol=1e-5)
    return np.asarray(weight.apply(jnp.ones((rows, 4)), of))


def test_tokens_are_kept_with_their_probability():
    mask = kept(20_000)
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(mask[:, 1:3], [[1, 0]] * 20_000)
    np.testing.assert_allclose(np.mean(mask, axis=0), [0.163326, 1, 0, 0.334670], atol=0.012)  # 4 standard deviations
    together = np.mean(mask[:, 0] * mask[:, 3])
    np.testing.assert_allclose(together, 0.163326 * 0.334670, atol=0.007, err_msg="tokens of a row are independent")


def test_the_mask_depends_on_seed_step_and_row():
    mask = kept(300)
    np.testing.assert_array_equal(mask, kept(300))
    for other in (kept(300, step=1), kept(300, seed=1), mask[::-1]):
        assert np.mean(mask != other) > 0.1


# --------------------------------------------------------------------------- in the weights of Eq 9


LENGTHS = np.array([5, 3, 7, 1, 2, 6, 7, 4], np.int32)
EVERY = ("top_d(alpha=0.7)", "iw_opd", "uc_mopd", "hardest(share=0.6)", "exclude(tokens=(3,))")


def batch(mesh=None):
    """Eight answers, of which six are selected."""
    random = np.random.default_rng(5)
    mask = np.arange(7) < LENGTHS[:, None]
    student, teacher = (np.where(mask, -random.exponential(size=(8, 7)), 0).astype(np.float32) for _ in range(2))
    selected = np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32)
    prompts = Prompts(np.zeros((8, 1), np.int32), np.ones(8, np.int32))
    tokens = random.integers(0, 9, (8, 7)).astype(np.int32)
    entropy = random.exponential(size=(8, 7)).astype(np.float32)
    rollout = Rollout(tokens, LENGTHS, student, np.zeros(8, np.float32), np.ones(8, bool))
    rows = (prompts, np.arange(8, dtype=np.int32) + 50, rollout, LogProbs(student, teacher), selected, entropy)
    rows = jax.tree.map(jnp.asarray, rows) if mesh is None else global_rows(mesh, rows, 8)
    prompts, index, rollout, log_probs, selected, entropy = rows
    selection = Selection(selected, jnp.argsort(-selected), jnp.int32(6), selected)
    return Batch(prompts, index, rollout, log_probs, selection, TeacherRecord({"entropy": entropy}))


def weighed(mesh=None, step=3, chosen=EVERY):
    shape = make_mesh(1, devices=jax.devices()[:1]) if mesh is None else mesh
    setup = resolve(train_config({"weights": chosen}), list(shape.devices.flat))
    rule = partial(weigh, setup=setup, branch="recovery")
    rows = None if mesh is None else sharding(mesh, "batch")
    return np.asarray(jax.jit(rule, out_shardings=rows)(batch(mesh), jnp.int32(step)))


def test_weights_are_applied_in_order_before_scale_and_means():
    of = batch()
    selected = np.asarray(of.selection.weights)[:, None] * (np.arange(7) < LENGTHS[:, None])
    gap = np.asarray(of.log_probs.gap)
    size = np.abs(gap) * selected
    before = (np.cumsum(size, axis=1) - size) / np.maximum(size.sum(axis=1, keepdims=True), 1e-30)
    expected = np.maximum(gap, np.log(0.3 / 0.7)) * (1 + 0.9 * (1 - before)) * 2 / (6 * LENGTHS[:, None]) * selected
    chosen = weights("reopold(lam=0.3)", "iw_opd(gamma=0.9)")
    got = token_weights(of, Method(), OBJECTIVES["sampled_token"](), 2.0, chosen)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_no_weight(shape):
    expected = weighed()
    assert 5 < np.count_nonzero(expected) < 25
    np.testing.assert_allclose(weighed(make_mesh(*shape)), expected, rtol=2e-6)


def test_other_steps_draw_other_masks():
    assert not np.array_equal(weighed() != 0, weighed(step=4) != 0)
    np.testing.assert_array_equal(weighed(chosen=("iw_opd",)), weighed(step=4, chosen=("iw_opd",)))


@pytest.mark.parametrize("spoiled", [np.nan, 1e9])
@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_padding_and_unselected_answers_have_no_effect(name, spoiled):
    text = "exclude(tokens=(3,))" if name == "exclude" else name
    of = batch()
    ignored = (np.arange(7) >= LENGTHS[:, None]) | (np.asarray(of.selection.weights) == 0)[:, None]

    def spoil(array):
        return jnp.where(ignored, spoiled, array)

    other = of.replace(
        log_probs=jax.tree.map(spoil, of.log_probs), teacher=TeacherRecord(jax.tree.map(spoil, of.teacher.tokens))
    )
    keys = row_keys(0, jnp.int32(0), of.index)
    pair = [token_weights(b, Method(), OBJECTIVES["sampled_token"](), 1.0, weights(text), keys) for b in (of, other)]
    np.testing.assert_array_equal(*pair)
    assert np.any(pair[0])


@pytest.mark.parametrize(
    "texts, of, message",
    [
        (["iw"], "sampled_token", r"weights\[0\] is 'iw'; the weights are top_d, reopold"),
        (["iw_opd", "top_d(alpha=1.0)"], "sampled_token", r"weights\[1\] is .*alpha is 1.0; give a number between"),
        (["reopold(lam=0.6)"], "sampled_token", "lam is 0.6; give a number between 0 and 0.5"),
        (["tide_excess(share=0)"], "sampled_token", "share is 0; give a share of the tokens"),
        (["hardest(share=1.5)"], "sampled_token", "share is 1.5"),
        (["iw_opd(gamma=1e999)"], "sampled_token", "gamma is inf; give a finite number"),
        (["unlikely(advantage=1)"], "sampled_token", "advantage is 1; give a finite number below 0"),
        (["overlong(limit=10)"], "sampled_token", "buffer is 4096; give a number of tokens between 1 and limit = 10"),
        (["exclude"], "sampled_token", r"tokens is \(\); give token ids"),
        (["exclude(tokens=('a',))"], "sampled_token", "give token ids"),
        (["reopold"], "forward_kl", "changes the advantage, but forward_kl has none; give sampled_token"),
        (["iw_opd", "reopold"], "sampled_token", r"weights\[1\] is 'reopold'.*give it before the other weights"),
        (["iw_opd()("], "sampled_token", r"give a name, with options as in top_d\(alpha=0.5\)"),
    ],
)  # fmt: skip
def test_invalid_weights(texts, of, message):
    with pytest.raises(UserError, match=rf"config\.branches\.recovery\.{message}|recovery\.weights.*{message}"):
        weights(*texts, of=of)


def test_masks_combine_with_every_objective():
    for name in OBJECTIVES:
        assert len(weights("iw_opd", "uc_mopd", "hardest", of=name)) == 3
