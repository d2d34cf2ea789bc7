"""Objectives over many words with the chunked head, against full logits, for every mesh and chunk size."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.method.gradient import GradientAccumulator, Loss, LossInputs
from camopd_jax.method.objectives import OBJECTIVES, StudentReading, TeacherReading, objective
from camopd_jax.method.tokens import Tokens
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.rollout.score import LOG_PROB, micro_batches, score, score_batch
from camopd_jax.runtime.mesh import global_rows, make_mesh
from camopd_jax.types import LogProbs, Prompts, Sequences, TeacherRecord

CONFIG = from_hf(dict(model_type="qwen3", vocab_size=44, hidden_size=24, intermediate_size=20, num_hidden_layers=1,
                      num_attention_heads=4, num_key_value_heads=4, head_dim=6, tie_word_embeddings=False,
                      initializer_range=0.6))  # fmt: skip
NAMES = ["reverse_kl", "forward_kl", "jsd(beta=0.3)", "teacher_top_k(k=5)", "corrected_top_k(k=5)",
         "binned_top_k(k=5)", "student_top_k(k=5)", "sampled_token", "cross_entropy", "tide_deficit(k=5)",
         "tide(k=5)", "selectkd(k=5)", "adakd"]  # fmt: skip
EVERY = [(d, f, t) for d, f, t in itertools.product((1, 2, 4, 8), repeat=3) if d * f * t == 8 and t <= 4]


@pytest.fixture(scope="module")
def case():
    """(student, teacher, sequences, weights): eight rows of different lengths; one prompt has the minimum length."""
    random = np.random.default_rng(0)
    model = Model(CONFIG)
    lengths = np.array([13, 3, 1, 5, 7, 2, 11, 4], np.int32)
    prompts = Prompts(random.integers(0, 44, (8, 6)).astype(np.int32), random.integers(1, 7, 8).astype(np.int32))
    sequences = Sequences(prompts, random.integers(0, 44, (8, 13)).astype(np.int32), lengths)
    weights = random.normal(size=(8, 13)).astype(np.float32) * (np.arange(13) < lengths[:, None])
    return model.init(jax.random.key(1)), model.init(jax.random.key(2)), sequences, weights


def student_gradient(name, case, mesh=None, chunk=0, size=8):
    """The gradient as in a run: the teacher's hidden states are stored, then the student's gradient is computed."""
    student, teacher, sequences, weights = case
    model, of = Model(CONFIG, mesh=mesh), objective(name, "objective")
    if mesh is not None:
        places = shardings(CONFIG, mesh)
        student, teacher = jax.device_put((student, teacher), (places, places))
        sequences, weights = global_rows(mesh, (sequences, weights), 8)
    else:
        sequences, places = jax.tree.map(jnp.asarray, sequences), None
    parts = list(micro_batches(mesh, sequences, size, 4))
    of_teacher = score_batch(model, teacher, sequences, parts, chunk, TeacherReading(of))
    head, reads = {name: teacher[name] for name in model.head_axes}, model if of.teacher_logits else None
    log_probs, record = of_teacher.pop("log_prob"), of_teacher
    if of.second_pass:
        given = TeacherRecord(record, head)
        of_student = score_batch(model, student, sequences, parts, chunk, StudentReading(of, reads), given)
        record |= constants(of, sequences, LogProbs(of_student.pop("log_prob"), log_probs), record | of_student)
    inputs = LossInputs(sequences, jnp.asarray(weights), record)
    return GradientAccumulator(Loss(model, of, reads), places, chunk)(student, student, inputs, parts, head)


def constants(of, sequences, log_probs, record):
    """Those of an objective whose share of tokens is 0.7, if it has one; every answer is trained."""
    trained = np.arange(13) < np.asarray(sequences.lengths)[:, None]
    state = of.initial_state() and of.initial_state() | {"token_share": jnp.float32(0.7)}
    return of.compare(Tokens(sequences.tokens, trained, sequences.lengths, log_probs, record, None), state)


def direct(name, case):
    """The same gradient from full logits, one row at a time."""
    student, teacher, sequences, weights = case
    model, of = Model(CONFIG), objective(name, "objective")

    def row(i, params):
        """The logits of a row's answer, and its targets."""
        p, t = int(sequences.prompts.lengths[i]), int(sequences.lengths[i])
        ids = np.concatenate([sequences.prompts.tokens[i, :p], sequences.tokens[i, :t]])[None]
        ours, theirs = (model.logits(w, model.hidden(w, ids))[0, p - 1 : p + t - 1] for w in (params, teacher))
        targets = {"tokens": jnp.asarray(sequences.tokens[i, :t]), "teacher_logits": theirs}
        return ours, targets | of.read(theirs, targets)

    def pad(rows):
        return jnp.stack([jnp.pad(array, (0, 13 - len(array))) for array in rows])

    of_batch = {}
    if of.second_pass:
        rows = [row(i, student) for i in range(8)]
        gaps = [[LOG_PROB(z, t)["log_prob"] for z in (ours, t["teacher_logits"])] for ours, t in rows]
        read = [of.read_student(ours, targets) for ours, targets in rows]
        record = {key: pad([one[key] for one in read]) for key in read[0]}
        of_batch = constants(of, sequences, LogProbs(*map(pad, zip(*gaps, strict=True))), record)

    def loss(params):
        total = 0.0
        for i, t in enumerate(sequences.lengths):
            ours, targets = row(i, params)
            targets |= {key: array[i, :t] for key, array in of_batch.items()}
            total += jnp.sum(weights[i, :t] * of.loss(ours, targets))
        return total

    return jax.value_and_grad(loss)(student)


def same(gradient, expected, tolerance=2e-5):
    """Equal up to `tolerance` of each array's largest value, because float32 sums have another order."""
    np.testing.assert_allclose(gradient.loss, expected[0], rtol=1e-5)

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))

    jax.tree.map(compare, gradient.of, expected[1])


JSD = "jsd(beta=0.3)"  # has both divergences
BINNED = "binned_top_k(k=5)"  # stores all that a top-K objective stores
FROM_ROWS = NAMES[7:12]  # of numbers and the K that others store; their losses are in test_objectives
LATE = ["tide(k=5)", "adakd"]  # with a second pass of the student


EQUAL = [name for name in NAMES[1:] if name not in FROM_ROWS]


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAMES[0], *EQUAL])
def test_the_gradient_equals_that_of_full_logits(name, case):
    same(student_gradient(name, case), direct(name, case))


@pytest.mark.parametrize(
    "name, chunk, size",
    [
        *[(JSD, 1, 8), (JSD, 16, 8), (JSD, 24, 2), (JSD, 10_000, 4), (BINNED, 16, 2)],
        pytest.param("adakd", 16, 2, marks=pytest.mark.slow),
    ],
)
def test_chunks_and_micro_batches_change_nothing(name, case, chunk, size):
    expected = student_gradient(name, case)
    same(student_gradient(name, case, chunk=chunk, size=size), (expected.loss, expected.of))


@pytest.mark.parametrize(
    "name, shape",
    [
        pytest.param(name, shape, marks=[] if name in (JSD, BINNED) and shape == (2, 2, 2) else pytest.mark.slow)
        for name, shape in [*((JSD, shape) for shape in EVERY), *((name, (2, 2, 2)) for name in NAMES if name != JSD)]
    ],
)
def test_a_mesh_changes_nothing(name, shape, case):
    expected = student_gradient(name, case)
    for chunk in (0, 16) if name in NAMES[:7] else (16,):
        same(student_gradient(name, case, make_mesh(*shape), chunk), (expected.loss, expected.of), 3e-5)


def test_no_objective_is_left_out():
    assert {name.split("(")[0] for name in NAMES} == set(OBJECTIVES) - {"minillm"}, (
        "which tests/method/test_minillm.py tests"
    )


@pytest.mark.parametrize("name", ["reverse_kl", BINNED, *(pytest.param(name, marks=pytest.mark.slow) for name in LATE)])
def test_padding_has_no_effect(name, case):
    """Also if it is the token that ends the answer."""
    student, teacher, sequences, weights = case
    beyond = np.arange(13) >= sequences.lengths[:, None]
    end = np.take_along_axis(sequences.tokens, sequences.lengths[:, None] - 1, axis=1)
    filled = np.where(np.arange(8)[:, None] % 2, end, 43 - sequences.tokens)
    other = sequences.replace(tokens=np.where(beyond, filled, sequences.tokens))
    expected = student_gradient(name, case)
    same(student_gradient(name, (student, teacher, other, weights)), (expected.loss, expected.of), 0)


def test_the_teachers_hidden_states_keep_their_dtype(case):
    _, teacher, sequences, _ = case
    model = Model(CONFIG, dtype="bfloat16")
    record = score(
        model, teacher, jax.tree.map(jnp.asarray, sequences), 0, TeacherReading(objective("reverse_kl", "o"))
    )
    assert record["hidden"].dtype == jnp.bfloat16 and record["hidden"].shape == (8, 13, 24)
    assert not np.asarray(record["hidden"][2, 1:]).any(), "0 in padding"
