"""MiniLLM's objective by hand and against its surrogate loss; runs whose answers both models sample together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Prompter, Watcher, make_run, train_config
from jax.test_util import check_grads

from camopd_jax.config.consistency import checked
from camopd_jax.config.identity import changed
from camopd_jax.config.schema import Compute, Optimizer, RolloutConfig, SelectionConfig
from camopd_jax.errors import UserError
from camopd_jax.method import schedule
from camopd_jax.method.objectives import objective
from camopd_jax.method.objectives.minillm import clipped, mean_returns
from camopd_jax.method.setup import resolve
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import Batch, LogProbs, Rollout

STUDENT, TEACHER = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.5, 0.15, 0.10])
NAMED = "config.branches.recovery.objective"


def test_returns_and_ppos_clip():
    """The published rewards, with padding; and ratios within and beyond 1 +- 0.2, on both sides of a return."""
    got = mean_returns(jnp.array([[-1.0, 0.5, -0.2, 0.0], [2.0, 0.0, 0.0, 0.0]]), jnp.array([3, 1]))
    np.testing.assert_allclose(got, [[-0.233333, 0.15, -0.2, 0], [2, 0, 0, 0]], atol=1e-6)
    ratio, returns = jnp.array([0.7, 0.7, 1.25, 1.25, 1.1]), jnp.array([0.5, -0.5, 0.5, -0.5, 2.0])
    np.testing.assert_allclose(clipped(ratio, returns, 0.2), [0.35, 0, 0, -0.625, 2.2], rtol=1e-6)


def test_the_constants_of_an_answer():
    """Gaps -2, 1 and -0.4 are rewards -1, 0.5 and -0.2; with a teacher's part of 0.2, by numpy."""
    gap, student = np.array([[-2.0, 1.0, -0.4, 9.0]]), np.log([[0.5, 0.3, 0.9, 0.1]])
    mixture = 0.2 * np.exp(student + gap) + 0.8 * np.exp(student)
    rollout = Rollout(None, jnp.array([3]), jnp.asarray(np.log(mixture), jnp.float32), None, None)
    log_probs = LogProbs(*(jnp.asarray(x, jnp.float32) for x in (student, student + gap)))
    got = objective("minillm", NAMED).constants(log_probs, rollout)
    ratio = (np.exp(student) / mixture)[0, :3]  # 1.209, 0.744, 1.071
    np.testing.assert_allclose(got["importance"], [[*ratio, 0]], rtol=1e-5)
    np.testing.assert_allclose(got["long_term"], [[0, 0, 0, 0]], atol=1e-7)  # both returns point beyond the clip
    wide = objective("minillm(clip=0.3)", NAMED).constants(log_probs, rollout)["long_term"]
    np.testing.assert_allclose(wide, [[ratio[0] * 0.15, ratio[1] * -0.2, 0, 0]], atol=1e-6)
    own = objective("minillm(clip=0.3, single_step=False)", NAMED).constants(log_probs, rollout)["long_term"]
    np.testing.assert_allclose(own, [[ratio[0] * -0.233333, ratio[1] * 0.15, ratio[2] * -0.2, 0]], atol=1e-6)
    low = objective("minillm(clip=0.3, reward_clip=0.5, reward_scale=1.0)", NAMED).constants(log_probs, rollout)
    np.testing.assert_allclose(low["long_term"], [[ratio[0] * 0.05, ratio[1] * -0.4, 0, 0]], atol=1e-6)


def test_the_loss_of_a_token():
    """`w KL(S || T) - c log S(y)`: reverse KL has the value 0.158669 and the gradient below."""
    z, t = (jnp.log(jnp.asarray(p, jnp.float32)) for p in (STUDENT, TEACHER))
    targets = {"tokens": jnp.int32(1), "teacher_logits": t, "importance": 1.2, "long_term": -0.5}

    def loss(z, name="minillm"):
        return objective(name, NAMED).loss(z, targets)

    value, gradient = jax.value_and_grad(loss)(z)
    of_kl, of_token = np.array([0.267239, -0.200848, -0.023800, -0.042591]), np.array([0, 1, 0, 0]) - STUDENT
    np.testing.assert_allclose(value, 1.2 * 0.158669 + 0.5 * np.log(0.3), atol=1e-5)
    np.testing.assert_allclose(gradient, 1.2 * of_kl + 0.5 * of_token, atol=1e-5)
    np.testing.assert_allclose(loss(z, "minillm(single_step=False)"), 0.5 * np.log(0.3), atol=1e-6)
    check_grads(loss, (z,), order=1, modes=["rev"], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "text, message",
    [("minillm(clip=1.0)", "clip is 1.0; give a number between 0 and 1"),
     ("minillm(reward_scale=0)", "reward_scale is 0; give a finite number above 0")],
)  # fmt: skip
def test_options_have_bounds(text, message):
    with pytest.raises(UserError, match=message):
        objective(text, NAMED)


# ------------------------------------------------------------------------------------- the loop

ROLLOUT = RolloutConfig(batch_size=4, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=8, sampler="mixed")
BRANCH = {"objective": "minillm", "selection": SelectionConfig(mass=1.0), "scale": 1.0}
CONFIG = train_config(
    BRANCH | {"steps": 1}, BRANCH, steps=1, rollout=ROLLOUT, optimizer=Optimizer(learning_rate=1e-2, micro_batch=2)
)
SPECULATIVE = changed(CONFIG, {
    "rollout.sampler": "speculative", "rollout.temperature": 0.5, "rollout.top_p": 0.5,
    "rollout.teacher_sampling.accept_top_k": 3, "branches.recovery.objective": "forward_kl",
    "branches.review.objective": "forward_kl",
})  # fmt: skip


def models(mesh):
    config = from_hf(dict(model_type="llama", vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6))  # fmt: skip
    model = Model(config, mesh=mesh)
    places = shardings(config, mesh)
    return model, *(jax.device_put(Model(config).init(jax.random.key(seed)), places) for seed in (0, 1))


@pytest.fixture(scope="module")
def tiny():
    return models(make_mesh(1, devices=jax.devices()[:1]))


def begin(tiny, config):
    model, student, general = tiny
    rows = schedule.batch_rows(config)
    prompters = {name: Prompter(i, (8,), rows[name], least=3) for i, name in enumerate(config.branches)}
    teachers = {name: general if name == "recovery" else student for name in config.branches}
    return make_run(config, model, student, teachers, prompters)


@pytest.mark.slow
def test_the_gradient_of_a_step_is_that_of_the_surrogate(tiny):
    """PPO's clipped surrogate and the expectation of each token's reward, differentiated as the paper writes them."""
    run = begin(tiny, CONFIG)
    branch, programs, (model, student, general) = run.branches["recovery"], run.programs, tiny
    prompts = programs.next_prompts(branch)
    answers = programs.generate(branch, run.state, prompts, np.int32(0))
    assert programs.needs_student_forward(5), "the recorded log-probabilities are not the student's"
    log_probs, record = programs.score(branch, run.state, prompts, answers, forward=True)
    selection = programs.select(branch, log_probs, answers, np.int32(0))
    sequences = answers.after(prompts.student)
    batch = Batch(prompts.student, prompts.index, answers, log_probs, selection, record)
    gradients, _ = programs.gradients(run.branches, run.state, {"recovery": batch})

    @dataclasses.dataclass(frozen=True)
    class Everything:
        keeps_hidden = False

        def __call__(self, logits, targets):
            return {"all": jax.nn.log_softmax(logits, axis=-1)}

    lengths = np.asarray(answers.lengths)
    mask = np.arange(answers.tokens.shape[1]) < lengths[:, None]
    tokens = answers.tokens[..., None]
    teacher = np.float64(score(model, general, sequences, reading=Everything())["all"])

    def surrogate(params):
        logp = score(model, params, sequences, reading=Everything())["all"]
        of_token = jnp.take_along_axis(logp, tokens, axis=-1)[..., 0]
        fixed = np.float64(jax.lax.stop_gradient(of_token))
        of_teacher = np.take_along_axis(teacher, np.asarray(tokens), axis=-1)[..., 0]
        mixture = np.log(0.2 * np.exp(of_teacher) + 0.8 * np.exp(fixed))
        np.testing.assert_allclose(answers.log_probs, np.where(mask, mixture, 0), atol=1e-5)
        later = np.zeros_like(fixed)  # the mean reward after each token
        for row, n in enumerate(lengths):
            rewards = 0.5 * (of_teacher - fixed)[row, :n]
            for t in range(n - 1):
                later[row, t] = rewards[t + 1 :].mean()
        ratio, later = jnp.exp(of_token - mixture), jnp.asarray(later, jnp.float32)
        long_term = jnp.minimum(ratio * later, jnp.clip(ratio, 0.8, 1.2) * later)
        rewards = jnp.sum(jnp.exp(logp) * (jnp.asarray(teacher, jnp.float32) - logp), axis=-1)  # expected
        weight = jnp.asarray(np.exp(fixed - mixture), jnp.float32)
        per_token = jnp.where(mask, weight * rewards + long_term, 0)
        return -jnp.mean(jnp.sum(per_token, axis=1) / lengths)

    wanted = jax.grad(surrogate)(student)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(np.max(np.abs(b))) + 1e-7),
        gradients["recovery"].of,
        wanted,
    )


def steps(tiny, config, count=3):
    watcher = Watcher(last=count)
    state = begin(tiny, dataclasses.replace(config, steps=count)).go(watcher)
    return state, watcher.records


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, shape, more",
    [
        (CONFIG, (1, 2, 1), {"mesh.fsdp": 2, "rollout.mesh.tensor": 2, "rollout.concurrency": 2}),
        (SPECULATIVE, (1, 1, 2), {"mesh.tensor": 2}),
    ],
    ids=["mixed", "speculative"],
)
def test_runs_on_a_mesh_and_in_two_parts_with_offloading(tiny, config, shape, more):
    """Two devices, and teachers in host memory with a run that continues from its state: the same as one device."""
    state, records = steps(tiny, config, 2)
    assert [record.phase for record in records] == ["recovery", "review"]
    gaps = [record.metrics.get("sampler_gap") for record in records]
    assert gaps == [None, None] if config is CONFIG else max(gaps) < 1e-5
    other, same = steps(models(make_mesh(*shape, devices=jax.devices()[:2])), changed(config, more), 2)
    for ours, theirs in zip(same, records, strict=True):
        for name, part in ours.batches.items():
            np.testing.assert_array_equal(part.rollout.tokens, theirs.batches[name].rollout.tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), other.params, state.params)
    parts = begin(tiny, dataclasses.replace(config, compute=Compute(offload="ahead")))
    middle = parts.go(Watcher(last=1))
    longer = dataclasses.replace(parts.programs.setup.config, steps=2)
    parts.programs.setup = dataclasses.replace(parts.programs.setup, config=longer)
    resumed = parts.go(Watcher(last=2), middle)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), resumed.params, state.params)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method.answers": "teacher"}, r"config\.method\.answers is 'teacher'; with rollout\.sampler 'mixed' .* give"),
        ({"rollout.student_logprobs": "sampler"}, r"student_logprobs is 'sampler'; .* give \"auto\" or \"forward\""),
        ({"compute.remat": "rollout"}, r"config\.compute\.remat is 'rollout'; .* give \"block\""),
        ({"rollout.answers_per_prompt": 2, "rollout.exploration": (1.5, 0.9)}, r"exploration is .*; give None"),
        ({"rollout.temperature": 0.7}, r"config\.rollout\.temperature is 0\.7; the mixture is of both .* give 1\.0"),
        ({"rollout.top_p": 0.9}, r"config\.rollout\.top_p is 0\.9; the mixture .* give 1\.0"),
        ({"rollout.sampler": "speculative", "method.importance_gate": (0.5, 2.0)}, r"importance_gate is .* give None"),
        ({"rollout.teacher_sampling.alpha": 1.5}, r"rollout\.teacher_sampling\.alpha.*1\.5"),
        ({"method.importance_gate": (0.0, 2.0)}, r"importance_gate is .* 'minillm' weighs tokens itself; give None"),
        ({"rollout.sampler": "speculative"}, r"objective is 'minillm', .* 'speculative'; give forward_kl"),
        (
            {"branches.recovery.objective": "sampled_token"},
            r"config\.branches\.recovery\.objective is 'sampled_token', which needs importance weights",
        ),
    ],
)
def test_fields_that_exclude_each_other(fields, message):
    with pytest.raises(UserError, match=message):
        resolve(checked(changed(CONFIG, fields)), jax.devices()[:1])


def test_importance_weights_by_the_gate():
    """Other objectives take their weights from `method.importance_gate`; the warm-up samples with the teacher alone."""
    plain = {f"branches.{name}.objective": "sampled_token" for name in CONFIG.branches}
    setup = resolve(checked(changed(CONFIG, plain | {"method.importance_gate": (0.0, 2.0)})), jax.devices()[:1])
    assert not setup.trusts_sampler and not setup.records_student
    assert not resolve(checked(SPECULATIVE), jax.devices()[:1]).trusts_sampler
    alone = train_config(rollout=dataclasses.replace(ROLLOUT, sampler="student"))
    assert resolve(alone, jax.devices()[:1]).trusts_sampler
    warm_up, _ = schedule.parts(changed(CONFIG, {"steps": 4, "warm_up.steps": 2}))
    assert warm_up.rollout.sampler == "student"
    resolve(warm_up, jax.devices()[:1])
