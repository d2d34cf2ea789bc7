"""Monitors of agreement: a vocabulary of four words by hand, and a run against full distributions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Prompter, Watcher, make_run, train_config

from camopd_jax.config.schema import Compute, Log, Method, Optimizer, RolloutConfig, SelectionConfig
from camopd_jax.method.agreement import MONITORS, Agreement
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runtime.mesh import make_mesh

STUDENT, TEACHER = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), jnp.log(jnp.array([0.25, 0.5, 0.15, 0.10]))


@pytest.mark.parametrize(
    "k, student, ratio, advantage, gap",
    [
        (1, STUDENT, 0, 0, 0.065854),
        (2, STUDENT, 1, -0.241657, 0.065854),  # (.5 log(.25/.5) + .3 log(.5/.3)) / .8
        (4, STUDENT, 1, -0.158669, 0.065854),  # minus the reverse KL
        (9, STUDENT, 1, -0.158669, 0.065854),
        (2, TEACHER, 1, 0, 0),
        (3, STUDENT[::-1], 2 / 3, -0.060774, 0.065854),  # words 1 and 2: (.15 log(.5/.15) + .3 log(.15/.3)) / .45
    ],
)
def test_four_words(k, student, ratio, advantage, gap):
    of = Agreement(k)
    record = of.read(TEACHER[None] + 3.0, {})
    assert record["agreement_ids"].shape == (1, min(k, 4)) and record["entropy"].shape == (1,)
    got = of.measure(student[None] - 5.0, record)
    assert tuple(got) == MONITORS
    np.testing.assert_allclose([value[0] for value in got.values()], [ratio, advantage, gap], atol=1e-5)


MODEL = from_hf(dict(model_type="llama", vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6))  # fmt: skip
CONFIG = train_config(
    {"steps": 1, "selection": SelectionConfig(mass=0.6)}, steps=2, log=Log(agreement=3),
    optimizer=Optimizer(learning_rate=1e-2, micro_batch=2),
    rollout=RolloutConfig(batch_size=4, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=4),
)  # fmt: skip


def run(config):
    """(student, teacher, last state, records) of two steps."""
    model = Model(MODEL, mesh=make_mesh(1, devices=jax.devices()[:1]))
    student, general = (
        jax.device_put(model.init(jax.random.key(seed)), shardings(MODEL, model.mesh)) for seed in (0, 1)
    )
    rows = 2 if config.method.schedule == "mixed" else 4
    prompters = {name: Prompter(i, (8,), rows, least=3) for i, name in enumerate(config.branches)}
    watcher = Watcher(last=2)
    made = make_run(config, model, student, {"recovery": general, "review": student}, prompters)
    return student, general, made.go(watcher), watcher.records


def direct(student, teacher, batch, k):
    """The means over the tokens of the selected answers, in numpy from full distributions."""
    model, values = Model(MODEL), []
    for i in np.flatnonzero(np.asarray(batch.selection.weights)):
        p, t = int(batch.prompts.lengths[i]), int(batch.rollout.lengths[i])
        ids = np.concatenate([batch.prompts.tokens[i, :p], batch.rollout.tokens[i, :t]])[None]
        for s, q in zip(*(np.asarray(jax.nn.softmax(model.logits(w, model.hidden(w, ids))[0, p - 1 : p + t - 1]))
                          for w in (student, teacher)), strict=True):  # fmt: skip
            both = list(set(np.argsort(-s)[:k]) & set(np.argsort(-q)[:k]))
            gap = np.sum(s[both] * np.log(q[both] / s[both])) / np.sum(s[both]) if both else 0
            values.append([len(both) / k, gap, abs(np.sum(s * np.log(s)) - np.sum(q * np.log(q)))])
    return np.mean(values, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("compute", [Compute(), Compute(logits_chunk=8)])
def test_a_run_measures_its_trained_tokens_and_nothing_else_changes(compute):
    student, general, state, records = run(dataclasses.replace(CONFIG, compute=compute))
    first = records[0].metrics
    assert records[0].batches["recovery"].selection.count == 3, "one of them alone in its micro-batch of 2"
    expected = direct(student, general, records[0].batches["recovery"], 3)
    np.testing.assert_allclose([first[name] for name in MONITORS], expected, rtol=1e-4)
    assert 0 < expected[0] < 1 and abs(expected[1]) > 0.1
    _, _, plain, without = run(dataclasses.replace(CONFIG, log=Log(), compute=compute))
    assert not set(MONITORS) & set(without[0].metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, plain.params)


@pytest.mark.slow
def test_a_mixed_run_measures_each_branch():
    """With all words and every answer, the advantage is minus the reverse KL, which is the loss over the scale 2."""
    every = {"selection": SelectionConfig(mass=1.0), "steps": 1}
    method = Method(schedule="mixed", normalise="token")
    config = train_config({**every, "objective": "reverse_kl"}, every, steps=2, log=Log(agreement=14), method=method,
                          optimizer=CONFIG.optimizer, rollout=CONFIG.rollout)  # fmt: skip
    _, _, _, records = run(config)
    recovery, review = (records[0].metrics[name] for name in ("recovery", "review"))
    assert recovery["overlap_ratio"] == review["overlap_ratio"] == 1
    np.testing.assert_allclose(recovery["overlap_advantage"], -recovery["loss"] / 2, rtol=1e-5)
    assert recovery["overlap_advantage"] < -0.1 and abs(review["overlap_advantage"]) < 1e-6
    np.testing.assert_allclose(review["entropy_gap"], 0, atol=1e-5)
