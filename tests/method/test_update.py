"""The updates against exact gradients and one optax step by hand, and settings that must have no effect."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import train_config as make_config

from camopd_jax.config.schema import Method, Optimizer, Sampling, SelectionConfig, SftConfig, Stream
from camopd_jax.method.gradient import GradientAccumulator, Loss, LossInputs, join_micro_batches
from camopd_jax.method.objectives import OBJECTIVES
from camopd_jax.method.optimizer import init_state, moment_names, project
from camopd_jax.method.select import select
from camopd_jax.method.update import branch_update, gap_spread, mixed_update, pcgrad, sft_update
from camopd_jax.method.weights import cross_entropy_weights, token_weights
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.rollout.generate import Decode, answers, for_decoding
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.rollout.score import score
from camopd_jax.runtime.buckets import MicroBatch, split_by_length
from camopd_jax.runtime.mesh import global_rows, make_mesh
from camopd_jax.types import Batch, LogProbs, Prompts, Rollout, Selection, Sequences

RATE = 1e-2
KEY = jax.random.key(7)
OPTIMIZER = Optimizer(learning_rate=RATE, weight_decay=0.1, micro_batch=2, eps=1e-3)
SAMPLED_TOKEN, CROSS_ENTROPY = OBJECTIVES["sampled_token"](), OBJECTIVES["cross_entropy"]()


def train_config(method=Method(), recovery=None, **optimizer):
    return make_config(recovery, method=method, optimizer=dataclasses.replace(OPTIMIZER, **optimizer))


def update(tiny, batch, selection=None, config=None, branch="recovery", state=None, model=None):
    config = config or train_config()
    state = init_state(tiny[1], moment_names(config)) if state is None else state
    return take_step(model or tiny[0], config, state, {branch: ranked(batch, branch, config, selection)})


def ranked(batch, branch, config, selection=None):
    prompts, rollout, log_probs = batch
    rule = config.branches[branch].selection
    selection = select(log_probs, rollout.lengths, KEY, rule) if selection is None else selection
    return Batch(prompts, jnp.arange(len(prompts.lengths)), rollout, log_probs, selection)


PROGRAMS = {}


def take_step(model, config, state, batches):
    """Computes the gradient of each batch's selected answers and one step; compiled once for all tests."""
    gradients = {
        name: gradient(accumulator(model, state), config, state.params, name, b) for name, b in batches.items()
    }
    if config.method.schedule == "mixed":
        program = PROGRAMS.setdefault(repr(config), jax.jit(partial(mixed_update, config=config)))
        return program(state, gradients, batches)
    (name,) = batches
    program = PROGRAMS.setdefault((name, repr(config)), jax.jit(partial(branch_update, branch=name, config=config)))
    return program(state, gradients[name], batches[name])


def accumulator(model, state):
    places = jax.tree.map(lambda x: x.sharding, state.params)
    return PROGRAMS.setdefault(model, GradientAccumulator(Loss(model, SAMPLED_TOKEN), places, 0))


def gradient(accumulator, config, params, branch, batch):
    order = np.asarray(batch.selection.order)[: int(batch.selection.count)]
    parts = micro_batches(batch.prompts, batch.rollout, order, config.optimizer.micro_batch)
    weights = token_weights(batch, config.method, SAMPLED_TOKEN, config.branches[branch].scale)
    return accumulator(params, params, LossInputs(batch.rollout.after(batch.prompts), weights), parts)


def micro_batches(prompts, rollout, order, size):
    widths = prompts.tokens.shape[1], rollout.tokens.shape[1]
    return split_by_length(np.asarray(prompts.lengths), np.asarray(rollout.lengths), order, size, widths, 4)


def row_logprobs(tiny, prompts, rollout):
    """f(params, row) -> log-probabilities [T] of its answer from a full softmax; one row at a time, padded to 12."""
    model, _ = tiny

    @jax.jit
    def padded(params, ids):
        logp = jax.nn.log_softmax(model.logits(params, model.hidden(params, ids[None])), axis=-1)[0]
        return jnp.take_along_axis(logp[:-1], ids[1:, None], axis=1)[:, 0]

    def one(params, i):
        p, t = int(prompts.lengths[i]), int(rollout.lengths[i])
        ids = np.concatenate([prompts.tokens[i, :p], rollout.tokens[i, :t], np.zeros(12 - p - t, np.int32)])
        return padded(params, ids)[p - 1 : p + t - 1]

    return one


def same(tree, other, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), tree, other)


# ------------------------------------------------------------------------------------- the maths


def test_the_expected_sampled_gradient_equals_that_of_the_reverse_kl(tiny):
    """All 196 two-token answers to one prompt, each weighted by its probability, give the gradient of
    1/2 (KL at the first token + the mean over first tokens of KL at the second), the prefixes held fixed.
    """
    model, params = tiny
    teacher = model.init(jax.random.key(9))
    vocab, prompt = 14, [3, 1, 4]
    answers = jnp.asarray([(a, b) for a in range(vocab) for b in range(vocab)], jnp.int32)
    rows = len(answers)
    prompts = Prompts(jnp.tile(jnp.asarray([prompt], jnp.int32), (rows, 1)), jnp.full(rows, 3, jnp.int32))
    lengths = jnp.full(rows, 2, jnp.int32)

    # As the program computes it: log-probabilities of sampled tokens, and their gaps.
    sequences = Sequences(prompts, answers, lengths)
    log_probs = LogProbs(*(score(model, p, sequences, chunk=64)["log_prob"] for p in (params, teacher)))
    rollout = Rollout(answers, lengths, log_probs.student, jnp.zeros(rows), jnp.ones(rows, bool))
    everything = Selection(jnp.ones(rows), jnp.arange(rows), jnp.int32(rows), jnp.ones(rows))
    batch = Batch(prompts, jnp.arange(rows), rollout, log_probs, everything)
    weights = token_weights(batch, Method(), SAMPLED_TOKEN, 1.0)
    probability = jnp.exp(jnp.sum(log_probs.student, axis=1, keepdims=True))
    learn = GradientAccumulator(Loss(model, SAMPLED_TOKEN), None, 64)
    whole = [MicroBatch(np.arange(rows, dtype=np.int32), 5, 2)]
    gradient = learn(params, params, LossInputs(sequences, weights * rows * probability), whole).of

    # Directly: from full distributions.
    def reverse_kl(student_logits, teacher_logits):
        p, q = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(teacher_logits)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    def exact(params):
        ids = jnp.asarray([[*prompt, a] for a in range(vocab)], jnp.int32)
        ours, theirs = (model.logits(p, model.hidden(p, ids)) for p in (params, teacher))
        kl = reverse_kl(ours, theirs)
        first = jax.lax.stop_gradient(jax.nn.softmax(ours[0, 2]))
        return 0.5 * (kl[0, 2] + jnp.sum(first * kl[:, 3]))

    same(gradient, jax.grad(exact)(params), atol=2e-6, rtol=1e-4)
    assert float(optax.global_norm(gradient)) > 0.1


def by_hand(tiny, batch, scale, kind, clip_norm=1.0):
    """One update in plain Python and optax: a loop over rows, with log-probabilities from full softmaxes."""
    params = tiny[1]
    prompts, rollout, scores = jax.tree.map(np.asarray, batch)
    log_probs = row_logprobs(tiny, prompts, rollout)
    gap = scores.teacher - scores.student
    mass = []
    for i, length in enumerate(rollout.lengths):
        row = gap[i, :length]
        mass.append(np.abs(row).mean() if kind == "absolute" else np.maximum(row, 0).mean())
    chosen, held = [], 0.0
    for i in sorted(range(len(mass)), key=lambda i: -mass[i]):
        chosen.append(i)
        held += mass[i]
        if held >= 0.8 * sum(mass):
            break

    def loss(params):
        total = 0.0
        for i in chosen:
            t = rollout.lengths[i]
            total -= jnp.sum(scale * gap[i, :t] * log_probs(params, i)) / t / len(chosen)
        return total

    def decays(path, _):
        return path[-1].key in ("kernel", "embedding", "head")

    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(RATE, eps=OPTIMIZER.eps, weight_decay=0.1, mask=partial(jax.tree_util.tree_map_with_path, decays)),
    )
    value, gradient = jax.value_and_grad(loss)(params)
    step, _ = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, step), value, optax.global_norm(gradient), len(chosen)


def test_a_mixed_update_uses_the_weighted_sum_of_gradients(tiny, batch):
    """Six general rows and two domain rows. Adam's first moment shows it, because it is linear in the gradient."""
    config = train_config(Method(schedule="mixed"), clip_norm=None)
    alone = train_config(clip_norm=None)
    cut = {"recovery": slice(0, 6), "review": slice(6, 8)}
    parts = {name: jax.tree.map(lambda a, rows=rows: a[rows], batch) for name, rows in cut.items()}
    batches = {name: ranked(part, name, config) for name, part in parts.items()}
    state = init_state(tiny[1])
    mixed, metrics = take_step(tiny[0], config, state, batches)
    (general, told), (domain, of_domain) = (take_step(tiny[0], alone, state, {n: b}) for n, b in batches.items())

    general_moment, domain_moment, moment = (s.moments["shared"].mu for s in (general, domain, mixed))
    same(moment, jax.tree.map(lambda g, d: 0.75 * g + 0.25 * d, general_moment, domain_moment), atol=1e-6)
    assert float(optax.global_norm(domain_moment)) > 1e-3
    np.testing.assert_allclose(metrics["loss"], 0.75 * told["loss"] + 0.25 * of_domain["loss"], rtol=1e-5)
    assert metrics["response_tokens"] == jnp.sum(batch[1].lengths)
    np.testing.assert_allclose(metrics["review"]["gap_mean"], of_domain["gap_mean"], rtol=1e-6)


def gaps(values):
    """A batch of answers of one token with these gaps; a last answer is not selected, and every row has padding."""
    rows = len(values) + 1
    gap = jnp.stack([jnp.asarray([*values, 7.0]), jnp.full(rows, 9.0)], axis=1)
    rollout = Rollout(jnp.zeros((rows, 2), jnp.int32), jnp.ones(rows, jnp.int32), None, None, None)
    selection = Selection(None, None, None, jnp.asarray([1.0] * len(values) + [0.0]))
    return Batch(None, None, rollout, LogProbs(jnp.zeros((rows, 2)), gap), selection)


def test_the_spread_of_gaps_by_hand():
    """sigma_all is .626276."""
    general, domain = gaps([-2, 0, 0, 0, 0.5, -0.5, 0.5, -0.5]), gaps([0.1, 0.1, -0.1, -0.1])
    factors = gap_spread({"recovery": general, "review": domain})
    np.testing.assert_allclose([factors["recovery"], factors["review"]], [0.835035, 4], atol=1e-5)
    factors = gap_spread({"recovery": general, "review": gaps([0, 0])})
    assert factors["review"] == 4, "student and teacher are equal"
    factors = gap_spread({"recovery": gaps([0, 0]), "review": gaps([0])})
    assert factors == {"recovery": 1, "review": 1}


def test_a_mixed_update_balanced_by_the_spread_of_gaps(tiny, batch):
    plain, balanced = (train_config(Method(schedule="mixed", balance=by), clip_norm=None)
                       for by in ("none", "gap_spread"))  # fmt: skip
    cut = {"recovery": slice(0, 6), "review": slice(6, 8)}
    parts = {name: jax.tree.map(lambda a, rows=rows: a[rows], batch) for name, rows in cut.items()}
    batches = {name: ranked(part, name, plain) for name, part in parts.items()}
    factors = gap_spread(batches)
    assert all(0.3 < float(f) < 3.5 and abs(float(f) - 1) > 0.01 for f in factors.values())
    state = init_state(tiny[1])
    moved, metrics = take_step(tiny[0], balanced, state, batches)
    alone = {n: take_step(tiny[0], train_config(clip_norm=None), state, {n: b})[0] for n, b in batches.items()}
    general, domain = (alone[name].moments["shared"].mu for name in batches)
    expected = jax.tree.map(lambda g, d: 0.75 * factors["recovery"] * g + 0.25 * factors["review"] * d, general, domain)
    same(moved.moments["shared"].mu, expected, atol=1e-6)
    np.testing.assert_allclose(metrics["review"]["balance"], factors["review"], rtol=1e-6)


def test_pcgrad_by_hand():
    g, d = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([1.0])}, {"a": jnp.array([-2.0, 1.0]), "b": jnp.array([0.0])}
    # g . d = -2, |g|^2 = 2, |d|^2 = 5
    left, right = pcgrad([g, d])
    same(left, {"a": jnp.array([1 - 0.8, 0.4]), "b": jnp.array([1.0])}, atol=1e-6)
    same(right, {"a": jnp.array([-2 + 1.0, 1.0]), "b": jnp.array([1.0])}, atol=1e-6)
    assert abs(float(optax.tree.vdot(left, d))) < 1e-6 and abs(float(optax.tree.vdot(right, g))) < 1e-6
    opposed = jax.tree.map(lambda x: -x, d)
    same(pcgrad([g, opposed]), [g, opposed], atol=0)
    zero = jax.tree.map(jnp.zeros_like, g)
    same(pcgrad([g, zero]), [g, zero], atol=0)


@pytest.mark.parametrize("branch, scale, kind", [("recovery", 2.0, "absolute"), ("review", 1.0, "positive")])
def test_an_update_equals_one_optax_step_by_hand(tiny, batch, branch, scale, kind):
    params, value, norm, chosen = by_hand(tiny, batch, scale, kind)
    state, metrics = update(tiny, batch, branch=branch)
    same(state.params, params, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["grad_clipped"] == float(norm > 1.0)
    assert metrics["selected_fraction"] == chosen / 8 and 0 < chosen < 8
    assert int(state.step) == 1


def test_a_recovery_step_does_not_depend_on_review_data(tiny, batch):
    """From the same state, a recovery step is bit-identical for any review data."""
    prompts, rollout, scores = batch
    other = (prompts, rollout, LogProbs(scores.student, scores.student - 1.0))
    state, _ = update(tiny, batch, config=train_config(Method(moments="separate")))
    after_other, _ = update(tiny, other, branch="review", config=train_config(Method(moments="separate")), state=state)
    same(after_other.moments["recovery"], state.moments["recovery"], rtol=0)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after_other.moments["review"], state.moments["review"])
    assert all(jax.tree.leaves(changed))


def test_shared_moments_depend_on_the_other_branch(tiny, batch):
    config = train_config(Method(moments="shared"))
    state, _ = update(tiny, batch, config=config)
    after, _ = update(tiny, batch, config=config, branch="review", state=state)
    assert set(after.moments) == {"shared"} and int(after.moments["shared"].count) == 2


# ------------------------------------------------------------------------- settings without effect


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_micro_batch_size_has_no_effect(tiny, batch, micro_batch):
    state, metrics = update(tiny, batch)
    again, again_metrics = update(tiny, batch, config=train_config(micro_batch=micro_batch))
    same(again.params, state.params, atol=1e-6, rtol=1e-5)
    same(again_metrics, metrics, rtol=1e-5)


def test_batch_order_has_no_effect(tiny, batch):
    order = np.random.default_rng(1).permutation(8)
    shuffled = jax.tree.map(lambda x: x[order], batch)
    state, metrics = update(tiny, batch)
    again, again_metrics = update(tiny, shuffled)
    same(again.params, state.params, atol=1e-6, rtol=1e-5)
    table, again_table = metrics.pop("answers"), again_metrics.pop("answers")
    same(again_metrics, metrics, rtol=1e-5)
    for name in table.keys() - {"index"}:
        np.testing.assert_allclose(again_table[name], table[name][order], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_a_mesh_changes_nothing(tiny, batch, shape):
    config = train_config(micro_batch=8)
    state, metrics = update(tiny, batch, config=config)
    mesh = make_mesh(*shape)
    model = Model(tiny[0].config, mesh=mesh)
    params = jax.device_put(tiny[1], shardings(model.config, mesh))
    spread = jax.tree.map(lambda x: global_rows(mesh, np.asarray(x), 8), batch)
    again, again_metrics = update(tiny, spread, config=config, model=model, state=init_state(params))
    same(again.params, state.params, atol=1e-6, rtol=1e-5)
    same(again_metrics, metrics, rtol=1e-5)


def test_unselected_rows_have_no_effect(tiny, batch):
    prompts, rollout, scores = batch
    selection = select(scores, rollout.lengths, KEY, SelectionConfig("absolute_gap"))
    out = np.asarray(selection.weights) == 0
    assert out.any()
    poisoned = scores.replace(teacher=jnp.where(out[:, None], jnp.nan, scores.teacher))
    tokens = jnp.where(out[:, None], 13 - rollout.tokens, rollout.tokens)
    state, _ = update(tiny, batch)
    again, metrics = update(tiny, (prompts, rollout.replace(tokens=tokens), poisoned), selection)
    same(again.params, state.params, rtol=0)
    assert metrics["skipped"] == 0


def test_micro_batches_in_one_call_equal_separate_calls(tiny, batch):
    """As on a CPU, and as on an accelerator."""
    (model, params), (prompts, rollout, _) = tiny, batch
    weights = jnp.asarray(np.random.default_rng(0).normal(size=rollout.tokens.shape), jnp.float32)
    order = np.argsort(np.asarray(prompts.lengths + rollout.lengths))
    cut = list(micro_batches(prompts, rollout, order, 2))
    assert len(list(join_micro_batches(cut, 8))) < len(cut) == 4

    def student_gradient(in_one_call):
        learn = GradientAccumulator(Loss(model, CROSS_ENTROPY), None, 64, in_one_call)
        return learn(params, params, LossInputs(rollout.after(prompts), weights), cut)

    same(student_gradient(True), student_gradient(False), atol=1e-6, rtol=1e-5)


def test_micro_batches_of_the_same_width_are_joined():
    """K does not depend on the number of micro-batches, so that other numbers compile nothing new."""
    wide, narrow = (24, 8), (16, 8)
    cut = [MicroBatch(np.array(rows), *widths) for rows, widths in
           [((5, 2), wide), ((4, 1), narrow), ((0, 3), narrow), ((6,), narrow)]]  # fmt: skip
    calls = [(part.slots, rows.rows.tolist(), int(rows.count)) for part, rows in join_micro_batches(cut, 7)]
    none = [7, 7]
    assert calls == [
        (24, [[5, 2], none, none, none], 1),
        (16, [[4, 1], [0, 3], none, none], 2),
        (16, [[6]] + [[7]] * 6, 1),
    ]


@pytest.mark.parametrize("shrinks", [False, True])
def test_a_gradient_from_the_residual_stream_needs_no_forward_pass(tiny, batch, shrinks):
    """It equals the plain gradient, and another residual stream changes it."""
    model, params = tiny
    prompts = batch[0]
    keeping, rows = dataclasses.replace(model, remat="rollout"), np.arange(len(prompts.lengths))
    decode = Decode(Sampling(), (2, 5), 7, shrinks=shrinks, keep_residuals=True)
    out = answers(keeping, for_decoding(model, params), prompts, row_keys(0, jnp.int32(1), rows), decode)
    assert len(set(np.asarray(out.lengths).tolist())) > 2, "some end early"
    assert [r.shape for r in out.residuals] == [(8, 5 + 7, 12)] * (model.config.num_layers + 1)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=out.tokens.shape), jnp.float32)
    cut = list(micro_batches(prompts, out, rows, 2))

    def student_gradient(model, residuals):
        inputs = LossInputs(out.after(prompts), weights, residuals=residuals)
        return GradientAccumulator(Loss(model, CROSS_ENTROPY), None, 64)(params, params, inputs, cut)

    plain, spared = student_gradient(model, ()), student_gradient(keeping, out.residuals)
    same(spared, plain, atol=1e-5, rtol=1e-4)
    same(student_gradient(keeping, ()), plain, atol=1e-6, rtol=1e-5)
    halved = student_gradient(keeping, (*out.residuals[:-1], out.residuals[-1] * jnp.array([[[0.5, 1] * 6]])))
    assert abs(halved.loss - plain.loss) > 1e-3, "the last is what the head reads"
    first = student_gradient(keeping, (out.residuals[0] * jnp.array([[[0.5, 1] * 6]]), *out.residuals[1:]))
    assert first.loss == spared.loss
    assert np.max(np.abs(first.of["layers"]["mlp"]["up"]["kernel"] - plain.of["layers"]["mlp"]["up"]["kernel"])) > 1e-3


class Counting(Model):
    """Counts the forward passes."""

    passes = 0

    def hidden(self, *args, **options):
        jax.debug.callback(self.count)
        return super().hidden(*args, **options)

    @staticmethod
    def count():
        Counting.passes += 1


@pytest.mark.parametrize("chosen", [1, 2, 5, 8])
def test_only_selected_answers_are_computed(tiny, batch, chosen):
    order = jnp.arange(8, dtype=jnp.int32)
    selection = Selection(jnp.ones(8), order, jnp.int32(chosen), (order < chosen).astype(jnp.float32))
    Counting.passes = 0
    state, _ = update(tiny, batch, selection, model=Counting(tiny[0].config))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert Counting.passes == {1: 1, 2: 1, 5: 3, 8: 4}[chosen]


# -------------------------------------------------------------------------------- clip and skips


def test_clipping_every_gradient_cancels_the_scale(tiny, batch):
    def step(scale, clip_norm):
        return update(tiny, batch, config=train_config(recovery={"scale": scale}, clip_norm=clip_norm))

    (once, clipped), (hundredfold, _) = step(1.0, 1e-3), step(100.0, 1e-3)
    assert clipped["grad_clipped"] == 1
    same(hundredfold.params, once.params, atol=1e-7, rtol=1e-5)
    (once, free), (hundredfold, _) = step(1.0, None), step(100.0, None)
    assert free["grad_clipped"] == 0
    moved = max(
        jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), hundredfold.params, once.params))
    )
    assert moved > 1e-3


def test_a_clip_of_each_branch_keeps_its_scale(tiny, batch):
    """With recovery's norm clipped to 2e-3 and review's to the shared 1e-3, Adam's first moments have these norms."""
    config = train_config(recovery={"clip_norm": 2e-3}, clip_norm=1e-3)
    for branch, norm in (("recovery", 2e-3), ("review", 1e-3)):
        state, metrics = update(tiny, batch, config=config, branch=branch)
        assert metrics["grad_norm"] > norm and metrics["grad_clipped"] == 1
        np.testing.assert_allclose(optax.global_norm(state.moments["shared"].mu), 0.1 * norm, rtol=1e-5)


def test_an_update_is_projected_against_the_last_gradient_of_another_branch(tiny, batch):
    """Weight decay is part of the displacement. Before the first review, nothing changes."""
    config = train_config(recovery={"project_against": "review"}, clip_norm=None)
    plain = train_config(clip_norm=None)
    start = init_state(tiny[1], moment_names(config))
    first, _ = update(tiny, batch, config=config, state=start)
    same(first.params, update(tiny, batch, config=plain)[0].params, rtol=0, atol=1e-7)
    # a review whose gradient opposes the recovery's: the same answers, with opposite gaps
    prompts, rollout, scores = batch
    opposed = (prompts, rollout, LogProbs(scores.student, 2 * scores.student - scores.teacher))
    every = Selection(jnp.ones(8), jnp.arange(8), jnp.int32(8), jnp.ones(8))
    reviewed, metrics = update(tiny, opposed, every, config=config, branch="review", state=first)
    gradient = reviewed.moments["gradient@review"]
    np.testing.assert_allclose(optax.global_norm(gradient), metrics["grad_norm"], rtol=1e-6)
    after, _ = update(tiny, batch, every, config=config, state=reviewed)
    free, _ = update(tiny, batch, every, config=plain, state=reviewed)
    moved, unprojected = (jax.tree.map(lambda a, b: a - b, s.params, reviewed.params) for s in (after, free))
    assert optax.tree.vdot(gradient, unprojected) > 1e-3
    assert abs(float(optax.tree.vdot(gradient, moved))) < 1e-5
    same(moved, project(unprojected, gradient), atol=1e-6)
    same(after.moments, free.moments, rtol=1e-6)


@pytest.mark.parametrize("spoiled", [jnp.nan, -jnp.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny, batch, spoiled):
    prompts, rollout, scores = batch
    state, _ = update(tiny, batch)
    bad = (prompts, rollout, scores.replace(teacher=scores.teacher.at[0, 0].set(spoiled)))
    for _ in range(2):
        after, metrics = update(tiny, bad, state=state)
        assert metrics["skipped"] == 1 and int(after.step) == int(state.step) + 1
        same(after.params, state.params, rtol=0)
        same(after.moments, state.moments, rtol=0)
        state = after
    _, metrics = update(tiny, batch, state=state)
    assert metrics["skipped"] == 0


def test_a_review_step_with_zero_gaps_only_decays(tiny, batch):
    """Student and teacher are equal: every gap is 0, all rows are kept, and nothing is divided by 0."""
    prompts, rollout, scores = batch
    state, metrics = update(tiny, (prompts, rollout, scores.replace(teacher=scores.student)), branch="review",
                            config=train_config(weight_decay=0.0))  # fmt: skip
    same(state.params, tiny[1], rtol=0)
    assert metrics["selected_fraction"] == 1 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert all(np.all(np.isfinite(value)) for value in jax.tree.leaves(metrics))


# ---------------------------------------------------------------------------------------- sft


def test_sft_is_cross_entropy_over_the_answer_tokens(tiny, batch):
    model, params = tiny
    prompts, rollout, _ = jax.tree.map(np.asarray, batch)
    log_probs = row_logprobs(tiny, prompts, rollout)
    config = SftConfig("m", Stream("d"), optimizer=dataclasses.replace(OPTIMIZER, clip_norm=None, weight_decay=0.0))
    sequences, slots = rollout.after(prompts), rollout.tokens.shape[1]
    inputs = LossInputs(sequences, cross_entropy_weights(rollout.lengths, slots))
    parts = micro_batches(prompts, rollout, np.arange(8), 2)
    gradient = GradientAccumulator(Loss(model, CROSS_ENTROPY), None, 64)(params, params, inputs, parts)
    program = jax.jit(partial(sft_update, config=config))
    state, metrics = program(init_state(params), gradient, sequences)

    def loss(params):
        return -jnp.concatenate([log_probs(params, i) for i in range(8)]).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    optimizer = optax.adam(RATE, eps=OPTIMIZER.eps)
    same(state.params, optax.apply_updates(params, optimizer.update(gradient, optimizer.init(params))[0]), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert metrics["response_tokens"] == 35 and metrics["prompt_tokens"] == 24
