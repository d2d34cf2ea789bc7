"""Objectives that compare all tokens of a step before the gradient: AdaKD and TIDE, against float64 and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from builders import Prompter, Watcher, make_run, train_config
from jax.test_util import check_grads

from camopd_jax.config.schema import Checkpoints, Optimizer, RolloutConfig, SelectionConfig
from camopd_jax.errors import UserError
from camopd_jax.method.objectives import StudentReading, objective
from camopd_jax.method.optimizer import run_state
from camopd_jax.method.tokens import Tokens
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runs.checkpoint import CheckpointStore
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import LogProbs

STUDENT, TEACHER = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.5, 0.15, 0.10])
Z, T = jnp.log(jnp.asarray(STUDENT, jnp.float32)), jnp.log(jnp.asarray(TEACHER, jnp.float32))
GAP = np.log(TEACHER / STUDENT)  # (-.693147, .510826, 0, .693147)


def of(text):
    return objective(text, "config.branches.recovery.objective")


def tokens(record=None, gap=None, trained=None):
    """A batch of answers [B, T] with these stored values or gaps; the student's log-probabilities are 0."""
    values = jnp.atleast_2d(jnp.asarray(gap if record is None else next(iter(record.values())), jnp.float32))
    gap = jnp.zeros_like(values) if gap is None else jnp.atleast_2d(jnp.asarray(gap, jnp.float32))
    record = {name: jnp.atleast_2d(jnp.asarray(array, jnp.float32)) for name, array in (record or {}).items()}
    trained = jnp.ones(values.shape, bool) if trained is None else jnp.asarray(trained)
    return Tokens(None, trained, jnp.full(len(values), values.shape[1]), LogProbs(gap * 0, gap), record, None)


def random_words(rows=3, slots=7, vocab=11):
    """Logits of a student and a teacher, float32[rows, slots, vocab], sampled words, and which tokens are trained."""
    random = np.random.default_rng(4)
    student, teacher = (2 * random.normal(size=(rows, slots, vocab)).astype(np.float32) for _ in range(2))
    trained = np.arange(slots) < np.array([7, 2, 5])[:, None]
    return student, teacher, random.integers(0, vocab, (rows, slots)), trained


# ------------------------------------------------------------------------------------------- AdaKD


def test_the_squared_hellinger_distance():
    for text, expected in (("adakd", 0.038438), ("adakd(squared=False)", np.sqrt(0.038438))):
        reading = StudentReading(of(text))
        got = reading(Z, {"tokens": jnp.int32(1), "teacher_logits": T})
        np.testing.assert_allclose(got["difficulty"], expected, atol=1e-5)
        np.testing.assert_allclose(got["log_prob"], np.log(0.3), atol=1e-6)
    near = Z + jnp.array([1e-4, 0, 0, 0])  # 1 - sum sqrt(S T) would be 0 or 1e-7
    p, q = (np.exp(np.float64(z)) / np.sum(np.exp(np.float64(z))) for z in (Z, near))
    expected = 1 - np.sum(np.sqrt(p * q))
    got = of("adakd").read_student(near, {"teacher_logits": Z})["difficulty"]
    np.testing.assert_allclose(got, expected, rtol=0.02)


def test_temperatures_by_difficulty():
    constants = of("adakd").compare(tokens({"difficulty": [0.1, 0.2, 0.4]}), of("adakd").initial_state())
    np.testing.assert_allclose(np.exp(constants["log_temperature"]), [[1.349859, 1, 0.740818]], atol=1e-6)
    np.testing.assert_array_equal(constants["kept"], 1)
    cold = of("adakd(c=1.0)").compare(tokens({"difficulty": [0.1, 0.2, 0.4]}), of("adakd").initial_state())
    np.testing.assert_allclose(np.exp(cold["log_temperature"]), [[1.349859**2, 1, 0.740818**2]], atol=1e-5)


@pytest.mark.parametrize(
    "share, kept, median", [(1.0, 4, 0.2), (0.75, 3, 0.4), (0.99, 3, 0.4), (0.5, 2, 0.4), (0.1, 1, 0.8)]
)
def test_the_hardest_tokens_are_kept(share, kept, median):
    """floor(share n) of them, and the median is theirs: of two in the middle, the smaller one."""
    batch = tokens({"difficulty": [[0.1, 0.4, 9.0], [0.8, 0.2, 9.0]]}, trained=[[True, True, False]] * 2)
    state = of("adakd").initial_state() | {"token_share": jnp.float32(share)}
    constants = of("adakd").compare(batch, state)
    difficulty = np.array([[0.1, 0.4], [0.8, 0.2]])
    chosen = difficulty >= np.sort(difficulty.ravel())[-kept]
    np.testing.assert_allclose(constants["kept"][:, :2], chosen * 4 / kept, rtol=1e-6)
    temperature = np.exp(-0.5 * np.tanh(np.log(difficulty / median)))
    np.testing.assert_allclose(np.exp(constants["log_temperature"])[:, :2], np.where(chosen, temperature, 1), rtol=1e-6)
    np.testing.assert_array_equal(constants["kept"][:, 2], 0)
    assert np.isfinite(np.exp(constants["log_temperature"])).all()


def test_equal_models_keep_every_token_at_temperature_1():
    constants = of("adakd").compare(tokens({"difficulty": np.zeros(5)}), of("adakd").initial_state())
    np.testing.assert_array_equal(np.exp(constants["log_temperature"]), 1)
    np.testing.assert_array_equal(constants["kept"], 1)


@pytest.mark.slow
def test_adakd_equals_its_authors_loss():
    """Against torch: the kept tokens and their mean of tau^2 KL at the temperature, with the gradient."""
    student, teacher, words, trained = random_words()
    adakd, state = of("adakd(squared=False)"), of("adakd").initial_state() | {"token_share": jnp.float32(0.6)}
    targets = {"tokens": jnp.asarray(words), "teacher_logits": jnp.asarray(teacher)}
    record = StudentReading(adakd)(jnp.asarray(student), targets)
    constants = adakd.compare(tokens({"difficulty": record["difficulty"]}, trained=trained), state)

    def ours(logits):
        return jnp.sum(trained * adakd.loss(logits, targets | constants)) / np.sum(trained)

    s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    chosen, t = s[torch.tensor(trained)], torch.tensor(teacher, dtype=torch.float64)[torch.tensor(trained)]
    roots = torch.sqrt(torch.softmax(chosen.detach(), -1)) - torch.sqrt(torch.softmax(t, -1))
    scores, places = torch.topk(torch.sqrt(torch.sum(roots**2, -1) / 2), int(0.6 * 14))
    tau = torch.exp(-0.5 * torch.tanh(torch.log(scores / torch.median(scores))))
    log_s, log_t = (torch.log_softmax(z[places] / tau[:, None], -1) for z in (chosen, t))
    theirs = torch.mean(tau**2 * torch.sum(torch.exp(log_s) * (log_s - log_t), -1))
    theirs.backward()
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, s.grad.numpy(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adakd", "tide(k=2)"])
def test_gradients_are_those_of_finite_differences(name):
    chosen = of(name)
    targets = {"tokens": jnp.int32(0), "teacher_logits": T} | chosen.read(T, {})
    for_adakd = {"kept": jnp.float32(1.5), "log_temperature": jnp.float32(0.3)}
    for_tide = {"excess": jnp.float32(-0.6), "lacking": jnp.float32(1)}
    targets |= for_adakd if name == "adakd" else for_tide
    check_grads(lambda z: chosen.loss(z, targets), (Z,), order=1, modes=["rev"], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
def test_without_temperatures_and_choice_it_is_the_reverse_kl():
    student, teacher, words, trained = random_words()
    targets = {"tokens": jnp.asarray(words), "teacher_logits": jnp.asarray(teacher)}
    record = of("adakd").read_student(jnp.asarray(student), targets)
    constants = of("adakd(c=0)").compare(tokens(record, trained=trained), of("adakd").initial_state())
    got = of("adakd(c=0)").loss(jnp.asarray(student), targets | constants)
    np.testing.assert_allclose(got[trained], of("reverse_kl").loss(jnp.asarray(student), targets)[trained], rtol=1e-6)
    assert not np.asarray(got[~trained]).any()


def test_the_share_follows_the_moving_average_of_the_loss():
    """With a decay of 0, the average is the loss: it falls by more than 5 %, by less, rises, and falls to the bound."""
    adakd = of("adakd(decay=0.0)")
    state, shares = adakd.initial_state(), []
    for loss in (2.0, 1.95, 1.8, 1.75, 1.95, 3.0, 1.0):
        state = adakd.next_state(state, jnp.float32(loss))
        shares.append(float(state["token_share"]))
    expected = [1, 1, 0.95, 0.95, 0.95 * 1.05, 1, 0.95]  # 1.95 > 1.05 x 1.8; 1.0474 is cut to 1
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    for n in range(1, 60):
        state = adakd.next_state(state, jnp.float32(0.9**n))
    np.testing.assert_allclose(state["token_share"], 0.1, rtol=1e-6)


def test_the_average_has_a_decay_of_99_percent():
    """Against plain Python: an average of losses that fall from 3 to 1, which takes five updates to fall by 5 %."""
    state, average, reference, share = of("adakd").initial_state(), None, None, 1.0
    for loss in [3.0] + [1.0] * 30:
        state = of("adakd").next_state(state, jnp.float32(loss))
        average = loss if average is None else 0.99 * average + 0.01 * loss
        reference = average if reference is None else reference
        if average < 0.95 * reference:
            share, reference = share * 0.95, average
    assert share == 0.95**3
    np.testing.assert_allclose(state["token_share"], share, rtol=1e-6)
    np.testing.assert_allclose([state["loss_average"], state["loss_reference"]], [average, reference], rtol=1e-5)


# -------------------------------------------------------------------------------------------- TIDE


def test_excess_and_deficit_of_the_toy():
    tide = of("tide(k=2, excess_share=1.0, deficit_share=1.0)")
    targets = {"tokens": jnp.int32(0)} | tide.read(T, {})
    deficit = StudentReading(tide)(Z, targets)["deficit"]
    np.testing.assert_allclose(deficit, 0.397183, atol=1e-5)
    constants = tide.compare(tokens({"deficit": np.full(4, deficit)}, gap=GAP), {})
    np.testing.assert_allclose(constants["excess"], [[-0.585786, 0, 0, 0]], atol=1e-5)
    np.testing.assert_array_equal(constants["lacking"], 1)
    one = {name: array[0, 0] for name, array in constants.items()}
    value, gradient = jax.value_and_grad(lambda z: tide.loss(z, targets | one))(Z)
    np.testing.assert_allclose(value, -0.585786 * -np.log(0.5) + 0.397183, atol=1e-5)
    of_parts = -0.585786 * (STUDENT - [1, 0, 0, 0]), np.array([0.166667, -0.366667, 0.15, 0.05])
    np.testing.assert_allclose(gradient, sum(of_parts), atol=1e-5)


def test_each_part_has_its_own_fifth_of_the_tokens():
    """Ten trained tokens: the excess takes two with a < 0, and only one if no other is negative; padding counts not."""
    gap = np.array([[-0.1, -0.5, 0.2, 3.0, 0.1, -9.0], [-2.0, 0.0, 0.3, 0.4, 0.5, -9.0]])
    deficit = np.array([[0.1, 0.2, 0.9, 0.3, 0.1, 9.0], [0.8, 0.1, 0.2, 0.3, 0.1, 9.0]])
    trained = np.arange(6)[None] < np.array([[5], [5]])
    constants = of("tide(lam=0.5)").compare(tokens({"deficit": deficit}, gap=gap, trained=trained), {})
    expected = np.zeros((2, 6))
    expected[0, 1], expected[1, 0] = 2 * np.expm1(-0.25), 2 * np.expm1(-1)
    np.testing.assert_allclose(constants["excess"], expected, rtol=1e-6)
    np.testing.assert_array_equal(constants["lacking"], 0.5 * (trained & (deficit >= 0.8)))
    alone = of("tide").compare(tokens({"deficit": deficit}, gap=np.where(gap == -2, -2, 1.0), trained=trained), {})
    assert np.sum(np.asarray(alone["excess"]) != 0) == 1


@pytest.mark.slow
def test_without_a_deficit_it_is_the_weight_tide_excess():
    student, teacher, words, trained = random_words()
    targets = {"tokens": jnp.asarray(words)} | of("tide").read(jnp.asarray(teacher), {})
    gap = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(teacher) - jax.nn.log_softmax(student)), words[..., None], axis=-1
    )[..., 0]
    record = of("tide").read_student(jnp.asarray(student), targets)
    constants = of("tide(lam=0)").compare(tokens(record, gap=gap, trained=trained), {})
    got = of("tide(lam=0)").loss(jnp.asarray(student), targets | constants)
    limit = np.sort(gap[trained])[2]  # of ceil(0.2 x 14) = 3 tokens
    weight = np.where((gap <= limit) & (gap < 0) & trained, 2 * np.expm1(gap / 2), 0)
    sampled = -np.take_along_axis(np.asarray(jax.nn.log_softmax(student)), words[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got[trained], (weight * sampled)[trained], atol=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("adakd(c=-1)", "c is -1; give a finite number, at least 0"),
        ("adakd(decay=1.0)", "decay is 1.0; give a number from 0 to below 1"),
        ("adakd(least=0)", "least is 0; give a share of the tokens, above 0 and at most 1"),
        ("adakd(squared=2)", "squared is 2; give True or False"),
        ("tide(k=0)", "k is 0; give a number of tokens"),
        ("tide(deficit_share=2)", "deficit_share is 2; give a share of the tokens"),
        ("tide(lam=-1)", "lam is -1; give a finite number, at least 0"),
    ],
)
def test_invalid_options(text, message):
    with pytest.raises(UserError, match=message):
        of(text)


# ---------------------------------------------------------------------------------------- in a run

ROLLOUT = RolloutConfig(batch_size=8, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=8)
MODEL = from_hf(dict(model_type="llama", vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6))  # fmt: skip
EVERY = SelectionConfig(mass=1.0)
ADAKD = {"objective": "adakd(decay=0.5, epsilon=0.01)", "selection": EVERY, "steps": 1}
TIDE = {"objective": "tide(k=3)", "selection": EVERY, "steps": 1}


def config(steps=4, **fields):
    values = {"steps": steps, "rollout": ROLLOUT, "optimizer": Optimizer(learning_rate=1e-2, micro_batch=4, eps=1e-4)}
    return train_config(ADAKD, TIDE, **values | fields)


def begin(of_run, shape=(1, 1, 1)):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    model, places = Model(MODEL, mesh=mesh), shardings(MODEL, mesh)
    student, general = (jax.device_put(Model(MODEL).init(jax.random.key(seed)), places) for seed in (0, 1))
    prompters = {name: Prompter(i, (8,), 8, 14, least=3) for i, name in enumerate(of_run.branches)}
    return make_run(of_run, model, student, {"recovery": general, "review": student}, prompters)


@pytest.mark.slow
def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    """The share, the average and its reference are in the checkpoint."""
    at_once, watcher = begin(config()), Watcher(milestones=[2], last=4)
    saved = CheckpointStore(str(tmp_path), Checkpoints(), {})
    pause = watcher.pause

    def save(steps_done, state):
        if steps_done == 2:
            saved.save(2, state, {}, {})
            saved.wait()
        return pause(steps_done, state)

    watcher.pause = save
    end = at_once.go(watcher)
    assert list(end.objectives) == ["recovery"] and 0.9 < end.objectives["recovery"]["token_share"] < 1
    last = watcher.records[2].metrics
    np.testing.assert_array_equal(last["token_share"], end.objectives["recovery"]["token_share"])
    resumed = begin(config())
    for stream in resumed.branches.values():
        next(stream.prompts)
    state, _, _ = saved.restore(2, run_state(resumed.state.params, config()))
    again = resumed.go(Watcher(last=4), state)
    jax.tree.map(np.testing.assert_array_equal, again, end)
