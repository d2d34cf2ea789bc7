"""Shares of a mixed batch that are met over several steps (`method.split = "over_steps"`)."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Prompter, Watcher, make_run, train_config

from camopd_jax.config.consistency import checked
from camopd_jax.config.identity import changed
from camopd_jax.config.methods import METHODS
from camopd_jax.config.schema import Method, Optimizer, RolloutConfig, SelectionConfig
from camopd_jax.errors import UserError
from camopd_jax.method import schedule
from camopd_jax.method.select import among_first, smallest_mass
from camopd_jax.method.setup import resolve
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.runtime.mesh import make_mesh

BASE = train_config(rollout=RolloutConfig(batch_size=64), optimizer=Optimizer(micro_batch=8))
REPLAY = changed(BASE, METHODS["replay-1"].changes)


def counts(config, steps, unit=1):
    rows = schedule.batch_rows(config, unit)
    return [schedule.trained_rows(config, rows, step) for step in range(steps)]


@pytest.mark.parametrize("unit", [1, 8])
def test_one_percent_of_a_batch_of_64(unit):
    """63 rows of review in every step (56 where rows come by eights); of all trained answers, 1 % are general."""
    of_steps = counts(REPLAY, 330, unit)
    review = {1: 63, 8: 56}[unit]
    assert {one["review"] for one in of_steps} == {review} and {one["recovery"] for one in of_steps} == {0, 1}
    general = np.cumsum([one["recovery"] for one in of_steps])
    for step, total in enumerate(general, 1):
        assert total == int(Fraction(review, 99) * step), "the largest whole number below the share"
    assert general[98] == review and review / (review + review * 99) == 0.01


def test_any_shares_and_any_number_of_branches():
    """In a compiled function as on the host, also late in a long run."""
    branches = {name: {"steps": n} for name, n in (("recovery", 3), ("review", 22))}
    config = train_config(*branches.values(), rollout=RolloutConfig(batch_size=62), method=Method(
        schedule="mixed", split="over_steps"))  # fmt: skip
    rows = schedule.batch_rows(config)
    assert rows == {"recovery": 8, "review": 54}  # 3/25 of 62 are 7.44
    traced = jax.jit(lambda step: schedule.trained_rows(config, rows, step))
    for step in [0, 1, 2, 21, 22, 23, 10**8 + 7, 2**31 - 1]:
        exact = int(Fraction(54 * 3, 22) * (step + 1)) - int(Fraction(54 * 3, 22) * step)
        assert (
            int(traced(jnp.int32(step))["recovery"]) == schedule.trained_rows(config, rows, step)["recovery"] == exact
        )
    assert sum(one["recovery"] for one in counts(config, 22)) == 54 * 3


def test_an_exact_split_is_as_before():
    exact = changed(BASE, METHODS["replay-12"].changes)
    assert counts(exact, 2) == [{"recovery": 8, "review": 56}] * 2
    over_steps = changed(exact, {"method.split": "over_steps"})
    assert counts(over_steps, 2) == counts(exact, 2)


def test_the_first_rows_of_a_selection():
    selection = smallest_mass(jnp.array([1.0, 6.0, 2.0, 3.0]), 1.0)
    some = among_first(selection, jnp.int32(2))
    np.testing.assert_array_equal(some.weights, [1, 1, 0, 0])
    np.testing.assert_array_equal(some.order, [1, 0, 3, 2])
    assert int(some.count) == 2 and int(among_first(selection, jnp.int32(0)).count) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method.split": "over_steps"}, "config.method.split is 'over_steps'; it splits a mixed batch"),
        (METHODS["replay-1"].changes | {"method.split": "exact"}, 'multiple of 100.*or method.split "over_steps"'),
        (
            METHODS["replay-1"].changes | {"branches.review.selection.mass": 0.8},
            r"branches\.review\.selection is .* 1$",
        ),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        checked(changed(BASE, changes))


def test_a_mesh_that_leaves_nothing():
    small = changed(REPLAY, {"rollout.batch_size": 8, "optimizer.micro_batch": 8, "mesh.data": 8})
    with pytest.raises(UserError, match=r"config\.rollout\.batch_size is 8, of which none is left for review"):
        resolve(small, jax.devices())


@pytest.mark.slow
def test_a_run_trains_the_rows_that_are_due():
    """A step without recovery is one of review alone, and the mean is over the answers that are trained."""
    model_config = from_hf(dict(model_type="llama", vocab_size=14, hidden_size=12, intermediate_size=20,
                                num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                initializer_range=0.6))  # fmt: skip
    every = {"selection": SelectionConfig(mass=1.0), "scale": 1.0}
    config = train_config(
        every | {"steps": 1}, every | {"steps": 6}, steps=3, method=Method(schedule="mixed", split="over_steps"),
        rollout=RolloutConfig(batch_size=4, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=8),
        optimizer=Optimizer(learning_rate=1e-2, micro_batch=2),
    )  # fmt: skip
    mesh = make_mesh(1, devices=jax.devices()[:1])
    model, places = Model(model_config, mesh=mesh), shardings(model_config, mesh)
    student, general = (jax.device_put(Model(model_config).init(jax.random.key(seed)), places) for seed in (0, 1))
    prompters = {"recovery": Prompter(0, (8,), 1), "review": Prompter(1, (8,), 3)}
    run = make_run(config, model, student, {"recovery": general, "review": general}, prompters)
    watcher = Watcher(last=3)
    run.go(watcher)
    trained = [{name: int(b.selection.count) for name, b in record.batches.items()} for record in watcher.records]
    assert trained == [{"recovery": n, "review": 3} for n in (0, 1, 0)]
    for record, one in zip(watcher.records, trained, strict=True):
        assert all(np.isfinite(jax.tree.leaves(record.metrics["recovery"])[0]).ravel())
        assert int(record.metrics["skipped"]) == 0
        of_branches = {name: float(record.metrics[name]["loss"]) for name in one}
        mean = sum(of_branches[name] * n for name, n in one.items()) / sum(one.values())
        np.testing.assert_allclose(record.metrics["loss"], mean, rtol=1e-5)
        assert (of_branches["recovery"] == 0) == (one["recovery"] == 0)
