"""Gradients of single answers, exact and projected, against loops of plain gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import train_config

from camopd_jax.analysis import gradients
from camopd_jax.analysis.diagnosis import figures
from camopd_jax.config.schema import Diagnostics, SelectionConfig
from camopd_jax.errors import UserError
from camopd_jax.method.gradient import Loss
from camopd_jax.method.objectives import OBJECTIVES
from camopd_jax.method.select import random_subset, select
from camopd_jax.types import Batch, LogProbs, Prompts

KEY = jax.random.key(11)
CONFIG = train_config(
    {"selection": SelectionConfig("absolute_gap", 0.7)}, diagnostics=Diagnostics(rows=8, micro_batch=4)
)
SAMPLED_TOKEN = OBJECTIVES["sampled_token"]()


def two_batches(batch, config=CONFIG):
    """The same answers with two teachers: as given, and with each row's gaps moved to the next row."""
    prompts, rollout, log_probs = batch
    mask = np.arange(rollout.tokens.shape[1]) < np.asarray(rollout.lengths)[:, None]
    gaps = np.roll(np.asarray(log_probs.gap), 1, axis=0)
    other = LogProbs(log_probs.student, jnp.asarray(np.where(mask, log_probs.student + gaps, 0)))
    batches = {}
    for name, given in {"recovery": log_probs, "review": other}.items():
        ranked = select(given, rollout.lengths, KEY, config.branches[name].selection)
        batches[name] = Batch(prompts, jnp.arange(8, dtype=jnp.int32), rollout, given, ranked)
    return batches


PROGRAMS = {}


def measured(tiny, batches, config=CONFIG):
    model, params = tiny
    losses = dict.fromkeys(batches, Loss(model, SAMPLED_TOKEN))
    program = PROGRAMS.setdefault(repr(config), jax.jit(partial(gradients.measure, losses=losses, config=config)))
    return jax.tree.map(np.asarray, program(params, batches, KEY))


@pytest.fixture(scope="module")
def by_hand(tiny, batch):
    """{branch: float64[8, N]}: each answer's gradient from full softmaxes, one answer at a time."""
    model, params = tiny
    flat, rebuild = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def loss(flat, ids, weights):
        params = rebuild(flat)
        logp = jax.nn.log_softmax(model.logits(params, model.hidden(params, ids[None])), axis=-1)[0]
        return -jnp.sum(weights * jnp.take_along_axis(logp[:-1], ids[1:, None], axis=1)[:, 0])

    found = {}
    for branch, scored in two_batches(batch).items():
        scale, rows = CONFIG.branches[branch].scale, []
        for i in range(8):
            p, t = int(scored.prompts.lengths[i]), int(scored.rollout.lengths[i])
            ids = np.zeros(13, np.int32)
            ids[: p + t] = [*scored.prompts.tokens[i, :p].tolist(), *scored.rollout.tokens[i, :t].tolist()]
            weights = np.zeros(12, np.float32)
            weights[p - 1 : p + t - 1] = scale * scored.log_probs.gap[i, :t] / t
            rows.append(np.asarray(jax.grad(loss)(flat, ids, weights), np.float64))
        found[branch] = np.stack(rows)
    return found


def test_coherence_signal_and_conflict_equal_a_loop_over_answers(tiny, batch, by_hand):
    parts = two_batches(batch)
    row = figures(measured(tiny, parts))
    means = {}
    for number, (branch, g) in enumerate(by_hand.items()):
        selected = np.asarray(parts[branch].selection.weights) > 0
        assert 1 < selected.sum() < 8
        lots = [np.asarray(random_subset(parts[branch].selection, key).weights) > 0
                for key in jax.random.split(jax.random.fold_in(KEY, number), gradients.RANDOM_SETS)]  # fmt: skip

        def coherence(rows, g=g):
            return np.linalg.norm(g[rows].sum(0)) / np.linalg.norm(g[rows], axis=1).sum()

        wanted = {
            "selected": coherence(selected),
            "all": coherence(slice(None)),
            "random": np.mean([*map(coherence, lots)]),
        }
        told = row["branches"][branch]
        assert told["coherence"] == pytest.approx(wanted, rel=1e-4)
        assert told["gcg"] == pytest.approx(wanted["selected"] / wanted["all"] - 1, rel=1e-3)
        assert told["gcg_random"] == pytest.approx(wanted["selected"] / wanted["random"] - 1, rel=1e-3)
        assert told["signal"]["selected"] == pytest.approx(np.linalg.norm(g[selected].mean(0)), rel=1e-4)
        assert told["selected_fraction"] == selected.mean()
        means[branch] = {"selected": g[selected].mean(0), "all": g.mean(0)}
    for name in gradients.SETS:
        g, d = means["recovery"][name], means["review"][name]
        lengths = np.linalg.norm(g), np.linalg.norm(d)
        assert row["conflict"][name]["dot"] == pytest.approx(g @ d, rel=1e-3)
        assert row["conflict"][name]["cosine"] == pytest.approx(g @ d / np.prod(lengths), rel=1e-3)
        assert row["conflict"][name]["survives"] == pytest.approx(np.linalg.norm(g + d) / sum(lengths), rel=1e-4)


def test_cosine_of_each_group(tiny, batch, by_hand):
    row = figures(measured(tiny, two_batches(batch)))
    assert list(row["layers"]) == ["embedding", "final_norm", "head", "layer 0"]
    size = tiny[1]["embedding"].size  # the first leaf of the flat gradient
    g, d = (by_hand[branch].mean(0)[:size] for branch in ("recovery", "review"))
    assert row["layers"]["embedding"] == pytest.approx(g @ d / np.linalg.norm(g) / np.linalg.norm(d), rel=1e-3)
    assert row["layer_dots"]["embedding"] == pytest.approx(g @ d, rel=1e-3)
    assert sum(row["layer_dots"].values()) == pytest.approx(row["conflict"]["all"]["dot"], rel=1e-3)


def test_a_subset_of_the_parameters(tiny, batch):
    config = dataclasses.replace(CONFIG, diagnostics=Diagnostics(rows=8, parameters="embedding, mlp.up"))
    row = figures(measured(tiny, two_batches(batch), config))
    everything = figures(measured(tiny, two_batches(batch)))
    assert list(row["layers"]) == ["embedding", "layer 0"]
    assert row["layers"]["embedding"] == pytest.approx(everything["layers"]["embedding"], rel=1e-4)
    assert row["layers"]["layer 0"] != pytest.approx(everything["layers"]["layer 0"], rel=1e-2)
    with pytest.raises(UserError, match=r"config\.diagnostics\.parameters is 'mpl'.* matches no parameter name"):
        gradients.select_parameters(tiny[1], Diagnostics(parameters="mpl"))


def test_the_micro_batch_changes_nothing(tiny, batch):
    config = dataclasses.replace(CONFIG, diagnostics=Diagnostics(rows=8, micro_batch=8))
    ours, theirs = measured(tiny, two_batches(batch), config), measured(tiny, two_batches(batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), ours, theirs)


@pytest.mark.slow
def test_projections_approximate_the_gradients(tiny, batch):
    """With the gradients of the batch: the error depends on the width, and the answers' norms are exact."""
    whole = measured(tiny, two_batches(batch))
    errors = {}
    for width in (15, 61):
        settings = dataclasses.replace(CONFIG.diagnostics, sketch=width)
        found = measured(tiny, two_batches(batch), dataclasses.replace(CONFIG, diagnostics=settings))
        np.testing.assert_allclose(
            found["branches"]["review"]["lengths"], whole["branches"]["review"]["lengths"], rtol=1e-4
        )
        ratios = [(found["branches"][b]["sum"] / whole["branches"][b]["sum"]) ** 2 for b in ("recovery", "review")]
        errors[width] = np.sqrt(np.mean((np.concatenate(ratios) - 1) ** 2))
    assert 0 < errors[61] < 2 * np.sqrt(2 / 61) and errors[61] < errors[15] < 2 * np.sqrt(2 / 15)


def test_mean_and_spread_of_a_projection():
    random = np.random.default_rng(2)
    a, b = (random.normal(size=(1, 7, 13, 11)).astype(np.float32) for _ in range(2))  # 7 layers of a matrix
    b = 0.6 * a + 0.8 * b
    width, exact = 31, float(np.sum(a * b))

    @jax.jit
    def product(key):
        sketch = partial(gradients.sketch, width=width, key=key)
        ours, theirs = (sketch({"layers.x": x})["layers.x"] for x in (a, b))
        return jnp.sum(ours * theirs), jnp.sum(ours**2)

    found, squares = map(np.asarray, zip(*(product(jax.random.key(i)) for i in range(400)), strict=True))
    spread = found.std() / abs(exact)
    assert abs(found.mean() / exact - 1) < 4 * spread / 20
    assert abs(squares.mean() / np.sum(a * a) - 1) < 0.05
    assert squares.std() / np.sum(a * a) < np.sqrt(2 / width)


def test_small_arrays_are_not_projected():
    g = {"final_norm.scale": jnp.arange(10.0).reshape(2, 5), "embedding": jnp.ones((2, 3, 4))}
    kept = gradients.sketch(g, 5, KEY)
    np.testing.assert_array_equal(kept["final_norm.scale"], g["final_norm.scale"])
    assert kept["embedding"].shape == (2, 5)


def test_zero_gradients_have_no_ratio(tiny, batch):
    """Before the first step, all gaps of the review branch are 0."""
    parts = two_batches(batch)
    student = parts["review"].log_probs.student
    still = LogProbs(student, student)
    ranked = select(still, parts["review"].rollout.lengths, KEY, CONFIG.branches["review"].selection)
    parts["review"] = parts["review"].replace(log_probs=still, selection=ranked)
    row = figures(measured(tiny, parts))
    assert row["branches"]["review"]["coherence"] == {"selected": None, "all": None, "random": None}
    assert row["branches"]["review"]["gcg"] is None and row["branches"]["review"]["signal"]["all"] == 0
    assert row["conflict"]["all"] == {"dot": 0, "cosine": None, "survives": pytest.approx(1)}


def test_an_answers_gradient_does_not_depend_on_other_rows(tiny, batch):
    """The norm of an answer's gradient is the same if the tokens of other answers change."""
    parts = two_batches(batch)
    prompts, rollout = parts["recovery"].prompts, parts["recovery"].rollout
    others = jnp.arange(8)[:, None] != 3
    changed = parts["recovery"].replace(
        prompts=Prompts(jnp.where(others, 1, prompts.tokens), prompts.lengths),
        rollout=rollout.replace(tokens=jnp.where(others, 2, rollout.tokens)),
    )
    one, loss = jnp.eye(8)[3:4], Loss(tiny[0], SAMPLED_TOKEN)

    @jax.jit
    def lengths(batch):
        inputs = gradients.answer_inputs(batch, loss, CONFIG, "recovery")
        return gradients.set_gradients(loss, tiny[1], inputs, {}, one, KEY, CONFIG)[1]

    ours, theirs = lengths(parts["recovery"]), lengths(changed)
    assert ours[3] == pytest.approx(float(theirs[3]), rel=1e-5)
    assert ours[0] != pytest.approx(float(theirs[0]), rel=1e-2)


def test_one_branch_has_no_conflict(tiny, batch):
    row = figures(measured(tiny, {"recovery": two_batches(batch)["recovery"]}, dataclasses.replace(CONFIG, seed=1)))
    assert row["conflict"] == row["layers"] == {} and row["branches"]["recovery"]["coherence"]["all"] > 0
