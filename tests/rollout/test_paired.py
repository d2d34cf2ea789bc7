"""Rollouts whose tokens student and teacher sample together: distributions, limits, recorded values, lanes, meshes."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from camopd_jax.config.schema import RolloutConfig, Sampling, TeacherSampling
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.paired import Pair, PairedPrompts
from camopd_jax.rollout.sampling import Mixed, Speculative, row_keys, sampling_of
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import Prompts

STUDENT, TEACHER = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.5, 0.15, 0.10])
MAX_NEW = 9
SPECULATIVE = Speculative(Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=0.5, top_p=0.5), top_k=3)


# ---------------------------------------------------------------------------------- one token


def filtered(probabilities, temperature, top_p):
    """At a temperature, reduced to the most likely tokens up to this total probability; for distinct values."""
    p = probabilities ** (1 / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: 1 + np.sum(np.cumsum(p[order]) < top_p)]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()


def speculative(student, teacher, top_k=2, of_student=(0.9, 0.99), of_teacher=(0.6, 0.9)):
    """The distribution of a token: accepted by the teacher, or redrawn from it."""
    proposed, redrawn = filtered(student, *of_student), filtered(teacher, *of_teacher)
    accepted = np.isin(np.arange(len(teacher)), np.argsort(-teacher)[:top_k])
    return np.where(accepted, proposed, 0) + proposed[~accepted].sum() * redrawn


@pytest.mark.parametrize(
    "rule, wanted",
    [
        (Mixed(0.2), 0.2 * TEACHER + 0.8 * STUDENT),
        (
            Speculative(Sampling(temperature=0.9, top_p=0.99), Sampling(temperature=0.6, top_p=0.9), 2),
            speculative(STUDENT, TEACHER),
        ),
    ],
)
def test_tokens_follow_the_samplers_distribution(rule, wanted):
    """A chi-square test of 20,000 tokens; the keys are fixed, so that it cannot fail by chance."""
    n = 20_000
    student, teacher = (jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (n, 1)) for p in (STUDENT, TEACHER))
    tokens, log_probs = jax.jit(rule)(student, teacher, jax.random.split(jax.random.key(7), n))
    counts, possible = np.bincount(tokens, minlength=4), wanted > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], n * wanted[possible]).pvalue > 0.01
    recorded = wanted if isinstance(rule, Mixed) else STUDENT
    np.testing.assert_allclose(log_probs, np.log(recorded)[np.asarray(tokens)], atol=1e-6)


def test_blocks_have_the_distribution_of_single_tokens():
    """Speculative KD checks blocks of the student's tokens: every answer of four tokens has the same probability."""
    random = np.random.default_rng(0)
    models = random.dirichlet(np.ones(3), (2, 4))  # student and teacher, after each last token; 3: at the start

    def token(last):
        return speculative(models[0][last], models[1][last], 1, of_teacher=(0.6, 1.0))

    def block(prefix):
        """{longer prefix: probability}: three proposals, the first rejected one redrawn, the rest dropped."""
        made = collections.Counter()
        for proposals in itertools.product(range(3), repeat=3):
            probability, kept = 1.0, prefix
            chain = list(itertools.pairwise((prefix[-1] if prefix else 3, *proposals)))
            for last, proposal in chain:
                probability *= filtered(models[0][last], 0.9, 0.99)[proposal]
            for last, proposal in chain:
                if proposal != np.argmax(models[1][last]):
                    for other, redrawn in enumerate(filtered(models[1][last], 0.6, 1.0)):
                        made[*kept, other] += probability * redrawn
                    break
                kept = (*kept, proposal)
            else:
                made[kept] += probability
        return made

    answers, growing = collections.Counter(), collections.Counter({(): 1.0})
    while growing:
        longer = collections.Counter()
        for prefix, probability in growing.items():
            for made, p in block(prefix).items():
                (answers if len(made) >= 4 else longer)[made[:4]] += probability * p
        growing = longer
    np.testing.assert_allclose(sum(answers.values()), 1, rtol=1e-12)
    for answer, probability in answers.items():
        one_by_one = np.prod([token(last)[word] for last, word in itertools.pairwise((3, *answer))])
        np.testing.assert_allclose(probability, one_by_one, rtol=1e-9)


def test_the_sampler_of_a_config():
    assert sampling_of(RolloutConfig(sampler="mixed")) == Mixed(0.2)
    spec = sampling_of(RolloutConfig(sampler="speculative", temperature=0.5, top_p=0.5))
    assert spec == Speculative(Sampling(temperature=0.5, top_p=0.5), Sampling(temperature=0.2, top_p=0.5), 25)
    own = TeacherSampling(alpha=0.5, accept_top_k=3, temperature=0.7, top_p=1.0)
    assert sampling_of(RolloutConfig(sampler="mixed", teacher_sampling=own)) == Mixed(0.5)
    spec = sampling_of(RolloutConfig(sampler="speculative", teacher_sampling=own))
    assert spec == Speculative(Sampling(), Sampling(temperature=0.7), 3)


# ------------------------------------------------------------------------------- complete answers


@pytest.fixture(scope="module")
def teacher(tiny):
    return tiny[0].init(jax.random.key(4))


@pytest.fixture(scope="module")
def prompts(batch):
    """The teacher reads other prompts, of other lengths and in a wider array."""
    of_teacher = np.random.default_rng(1).integers(0, 14, (8, 7)).astype(np.int32)
    lengths = np.array([7, 2, 5, 1, 6, 3, 4, 7], np.int32)
    return PairedPrompts(batch[0], Prompts(jnp.asarray(of_teacher), jnp.asarray(lengths)))


def paired(tiny, teacher, prompts, sampling, model=None, keys=None, eos_ids=(2, 5), **options):
    model = model or tiny[0]
    pair = Pair(model, model)
    keys = row_keys(0, jnp.int32(1), jnp.arange(len(prompts.lengths))) if keys is None else keys
    params = generate.for_decoding(pair, (tiny[1], teacher))
    return generate.answers(pair, params, prompts, keys, Decode(sampling, eos_ids, MAX_NEW, **options))


def alone(model, params, prompts, sampling):
    keys = row_keys(0, jnp.int32(1), jnp.arange(len(prompts.lengths)))
    return generate.answers(
        model, generate.for_decoding(model, params), prompts, keys, Decode(sampling, (2, 5), MAX_NEW)
    )


def assert_same_answers(ours, theirs):
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, who, sampling",
    [
        (Mixed(0.0), "student", Sampling()),
        (Mixed(1.0), "teacher", Sampling()),
        (dataclasses.replace(SPECULATIVE, top_k=25), "student", SPECULATIVE.student),
        (Speculative(Sampling(), Sampling(temperature=0.0), 1), "teacher", Sampling(temperature=0.0)),
    ],
)
def test_limits_are_the_answers_of_one_model(tiny, teacher, prompts, rule, who, sampling):
    """With the same keys: no part of the teacher, all of it; every token accepted, only the teacher's first one."""
    of_one = (tiny[1], prompts.student) if who == "student" else (teacher, prompts.teacher)
    wanted = alone(tiny[0], *of_one, sampling)
    assert_same_answers(paired(tiny, teacher, prompts, rule), wanted)
    assert 0 < int(jnp.sum(wanted.stopped)) < 8, "the case should hold both kinds of ending"


@pytest.mark.parametrize("rule", [Mixed(0.3), pytest.param(SPECULATIVE, marks=pytest.mark.slow)])
def test_recorded_log_probs_are_those_of_forward_passes(tiny, teacher, prompts, rule):
    """Of the mixture, or of the student at temperature 1; the teacher's with its own prompts."""
    out = paired(tiny, teacher, prompts, rule)
    student = score(tiny[0], tiny[1], out.after(prompts.student))["log_prob"]
    of_teacher = score(tiny[0], teacher, out.after(prompts.teacher))["log_prob"]
    mask = np.arange(MAX_NEW) < np.asarray(out.lengths)[:, None]
    mixture = np.log(0.3 * np.exp(np.float64(of_teacher)) + 0.7 * np.exp(np.float64(student)))
    wanted = np.where(mask, mixture, 0) if isinstance(rule, Mixed) else student
    np.testing.assert_allclose(out.log_probs, wanted, atol=1e-5)
    assert np.max(np.abs(np.where(mask, mixture - student, 0))) > 0.1, "the models differ"


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, options, segment",
    [(Mixed(0.3), {"concurrency": 4, "shrinks": True}, 2), (SPECULATIVE, {"concurrency": 3}, 4)],
)
def test_lanes_and_growing_caches_change_no_answer(tiny, teacher, prompts, rule, options, segment, monkeypatch):
    whole = paired(tiny, teacher, prompts, rule, eos_ids=(2, 5, 9))
    assert len(set(np.asarray(whole.lengths).tolist())) > 3, "the case should hold answers of many lengths"
    monkeypatch.setattr(generate, "FIRST_RING", segment)
    other = paired(tiny, teacher, prompts, rule, eos_ids=(2, 5, 9), **options)
    assert_same_answers(other, whole)
    np.testing.assert_allclose(other.log_probs, whole.log_probs, atol=1e-5)
    np.testing.assert_allclose(other.entropy, whole.entropy, atol=1e-5)


@pytest.mark.slow
def test_several_answers_to_a_prompt_and_a_mesh(tiny, teacher, prompts):
    rule = SPECULATIVE
    rows = jax.tree.map(lambda array: jnp.repeat(array, 2, axis=0), prompts)
    keys = row_keys(0, jnp.int32(1), jnp.repeat(jnp.arange(8), 2), 2)
    whole = paired(tiny, teacher, rows, rule, keys=keys)
    assert_same_answers(paired(tiny, teacher, rows, rule, keys=keys, answers_per_prompt=2), whole)
    first = jax.tree.map(lambda array: array[::2], whole.replace(residuals=()))
    assert_same_answers(first, paired(tiny, teacher, prompts, rule))
    model = dataclasses.replace(tiny[0], mesh=make_mesh(1, 2, 2, devices=jax.devices()[:4]))
    options = {"answers_per_prompt": 2, "concurrency": 8}
    assert_same_answers(paired(tiny, teacher, rows, rule, model=model, keys=keys, **options), whole)


def test_the_plain_program_computes_one_model(tiny, teacher, prompts):
    """Of the products of a turn, the pair's program has twice those of the plain one, which no sampler changes."""
    model, keys = tiny[0], row_keys(0, jnp.int32(1), jnp.arange(8))
    drawing = {"eos_ids": (2,), "max_new": MAX_NEW}

    def products(of, params, rows, sampling):
        p, params = generate.programs_of(of), generate.for_decoding(of, params)
        state = p.begin.eval_shape(of, params, rows, keys, np.arange(8), sampling=sampling, **drawing)
        slots = {"prompt_slots": rows.tokens.shape[1]}
        ring = slots | {"slots": rows.tokens.shape[1] + MAX_NEW}
        cache = jax.tree.map(lambda x: p.grow[x.ndim == 4].eval_shape(x, state.slot, **ring), state.cache)
        state, more = state.replace(cache=cache), slots | {"sampling": sampling, "eos_ids": (2,)}
        return p.advance.lower(of, params, state, np.int32(0), **more).as_text().count("dot_general")

    plain = products(model, tiny[1], prompts.student, Sampling())
    assert plain == 2 + 7 + 1, "attention twice, the kernels of one layer, the head"
    assert products(Pair(model, model), (tiny[1], teacher), prompts, Mixed(0.3)) == 2 * plain
