"""Runs on every mesh of eight devices equal a run on one: losses, selections and parameters after several steps."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import Prompter, SeveralAnswers, Watcher, make_run, train_config

from camopd_jax.config.schema import Compute, MeshConfig, Optimizer, RolloutConfig, SelectionConfig
from camopd_jax.method.gradient import GradientAccumulator, Loss, LossInputs
from camopd_jax.method.objectives import OBJECTIVES
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runtime.buckets import MicroBatch
from camopd_jax.runtime.mesh import global_rows, make_mesh, sharding
from camopd_jax.types import Prompts, Sequences

MODEL = from_hf(dict(model_type="qwen3", vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=4, head_dim=8, initializer_range=0.6,
                     tie_word_embeddings=False))  # fmt: skip
CONFIG = train_config(
    {"steps": 1}, steps=4,
    rollout=RolloutConfig(batch_size=16, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=8),
    # with Adam's usual eps, a gradient that is rounding alone moves its parameter by a whole step
    optimizer=Optimizer(learning_rate=1e-2, micro_batch=8, eps=1e-4),
)  # fmt: skip
EVERY = [(d, f, t) for d, f, t in itertools.product((1, 2, 4, 8), repeat=3) if d * f * t == 8 and t <= 4]
USUAL = [(1, 4, 2)]


def run(config, mesh, stream=Prompter):
    """(state, records) of a run on a mesh."""
    config = dataclasses.replace(config, mesh=MeshConfig(*mesh.devices.shape))
    model, places = Model(MODEL, mesh=mesh), shardings(MODEL, mesh)
    specialised, general = (jax.device_put(Model(MODEL).init(jax.random.key(seed)), places) for seed in (0, 1))
    teachers = {"recovery": general, "review": specialised}
    prompters = {name: stream(i, (8,), 16, 24, least=3) for i, name in enumerate(teachers)}
    watcher = Watcher(last=config.steps)
    state = make_run(config, model, specialised, teachers, prompters, eos_ids=(2, 5)).go(watcher)
    return state, watcher.records


@pytest.fixture(scope="module")
def alone():
    return run(CONFIG, make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("remat, shape", [
    *[pytest.param("block", shape, marks=[] if shape in USUAL else pytest.mark.slow) for shape in EVERY],
    *[pytest.param("rollout", shape, marks=[] if shape == (2, 2, 2) else pytest.mark.slow) for shape in EVERY],
])  # fmt: skip
def test_a_run_is_the_same_on_every_mesh(alone, remat, shape):
    """With another mesh for the rollout, and with waiting prompts unless the residual stream is kept."""
    tensor, concurrency = max(2, shape[2]), 8 if remat == "block" else 0
    rollout = dataclasses.replace(CONFIG.rollout, mesh=MeshConfig(tensor=tensor), concurrency=concurrency, shrinks=True)
    mesh = make_mesh(*shape)
    state, records = run(dataclasses.replace(CONFIG, rollout=rollout, compute=Compute(remat=remat)), mesh)
    assert [o.phase for o in records] == ["recovery", "review"] * 2
    for ours, theirs in zip(records, alone[1], strict=True):
        for name, part in ours.batches.items():
            other = theirs.batches[name]
            np.testing.assert_array_equal(part.rollout.tokens, other.rollout.tokens)
            np.testing.assert_array_equal(part.selection.weights, other.selection.weights)
            assert 0 < part.selection.count < 16 or ours.phase == "review"
            assert part.rollout.tokens.sharding.is_equivalent_to(sharding(mesh, "batch"), 2)
            assert part.log_probs.teacher.sharding.is_equivalent_to(sharding(mesh, "batch"), 2)
        np.testing.assert_allclose(ours.metrics["loss"], theirs.metrics["loss"], rtol=1e-3, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, alone[0].params)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), state.params, Model(MODEL).init(jax.random.key(0)))
    assert max(jax.tree.leaves(moved)) > 1e-2

    def lies(array, place):
        assert array.sharding.is_equivalent_to(place, array.ndim), (array.sharding, place)

    for tree in (state.params, state.moments["shared"].mu, state.moments["shared"].nu):
        jax.tree.map(lies, tree, shardings(MODEL, mesh))


@pytest.mark.slow
def test_explorations_are_the_same_on_a_mesh():
    """UC-MOPD: two answers to each of 8 prompts, the second an exploration, with the random mask; one with refills."""
    rollout = dataclasses.replace(CONFIG.rollout, batch_size=8, answers_per_prompt=2, exploration=(1.5, 0.9))
    uc_mopd = {"steps": 1, "selection": SelectionConfig(keep="density"), "weights": ("uc_mopd",)}
    config = train_config(uc_mopd, uc_mopd, steps=2, rollout=rollout, optimizer=CONFIG.optimizer)
    state, records = run(config, make_mesh(1, devices=jax.devices()[:1]), SeveralAnswers)
    waiting = dataclasses.replace(rollout, mesh=MeshConfig(tensor=2), concurrency=8, shrinks=True)
    on_mesh, same = run(dataclasses.replace(config, rollout=waiting), make_mesh(1, 4, 2), SeveralAnswers)
    for ours, theirs in zip(same, records, strict=True):
        (part,), (other,) = ours.batches.values(), theirs.batches.values()
        np.testing.assert_array_equal(part.rollout.tokens, other.rollout.tokens)
        np.testing.assert_array_equal(part.selection.weights, other.selection.weights)
        np.testing.assert_array_equal(other.selection.weights[::2], 1)
    first = records[0].batches["recovery"].selection.weights[1::2]
    assert 0 < np.sum(first) < 8, "the case should hold explorations of both kinds"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), on_mesh.params, state.params)


def gradient(mesh):
    """(loss, gradient) of the quickstart's specialised model on random answers with random weights."""
    folder = Path(__file__).parents[2] / "examples" / "quickstart" / "specialist"
    config = from_hf(hf.read_config(folder), context=48)
    random = np.random.default_rng(0)
    lengths = random.integers(1, 17, 16).astype(np.int32)
    prompt_tokens, answers = (random.integers(0, config.vocab_size, (16, n)).astype(np.int32) for n in (32, 16))
    weights = (random.normal(size=(16, 16)) * (np.arange(16) < lengths[:, None])).astype(np.float32)
    prompts = Prompts(prompt_tokens, random.integers(5, 33, 16).astype(np.int32))
    inputs = LossInputs(*global_rows(mesh, (Sequences(prompts, answers, lengths), weights), 16))
    accumulator = GradientAccumulator(
        Loss(Model(config, mesh=mesh), OBJECTIVES["cross_entropy"]()), shardings(config, mesh), 0
    )
    params = hf.load(folder, config, mesh, "float32")
    parts = [MicroBatch(np.array([0, 3, 5, 7, 9, 11, 16, 16]), 48, 16)]
    return jax.tree.map(np.asarray, accumulator(params, params, inputs, parts))


@pytest.fixture(scope="module")
def gradient_alone():
    return gradient(make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("shape", [
    pytest.param(shape, marks=[] if shape in USUAL else pytest.mark.slow) for shape in EVERY
])  # fmt: skip
def test_the_gradient_of_a_trained_model_is_the_same_on_every_mesh(gradient_alone, shape):
    """A model of other sizes than above, for which the compiler chooses other shardings."""
    ours = gradient(make_mesh(*shape))
    np.testing.assert_allclose(ours.loss, gradient_alone.loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.max(np.abs(b))), ours.of, gradient_alone.of
    )
