"""The training loop with a tiny random model: order of branches, compilations, offloading, frozen parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Prompter, SeveralAnswers, Watcher, make_run, train_config

from camopd_jax.config.schema import (
    BranchConfig,
    Compute,
    Method,
    Optimizer,
    RolloutConfig,
    SelectionConfig,
    Stream,
    WarmUp,
)
from camopd_jax.errors import UserError
from camopd_jax.method import programs as programs_module
from camopd_jax.method import recorder, schedule
from camopd_jax.method.setup import check_remat, resolve
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.rollout import generate
from camopd_jax.rollout.score import score, scoring
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import Rollout

ROLLOUT = RolloutConfig(batch_size=4, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=4, score_batch=4)
CONFIG = train_config(steps=8, rollout=ROLLOUT, optimizer=Optimizer(learning_rate=1e-2, micro_batch=2))


@pytest.mark.parametrize(
    "recovery, review, order",
    [(3, 1, "gggdgggdg"), (1, 1, "gdgdgdgdg"), (0, 1, "ddddddddd"), (2, 0, "ggggggggg"), (1, 2, "gddgddgdd")],
)
def test_the_order_of_branches(recovery, review, order):
    """Eq 5, with n_g = `recovery` and n_d = `review`."""
    config = train_config({"steps": recovery}, {"steps": review})
    acting = [schedule.active_branches(config, step) for step in range(9)]
    assert "".join({"recovery": "g", "review": "d"}[name] for (name,) in acting) == order
    assert [schedule.phase(config, step) for step in range(9)] == [name for (name,) in acting]


@pytest.fixture(scope="module")
def tiny():
    config = from_hf(dict(model_type="llama", vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6))  # fmt: skip
    model = Model(config, mesh=make_mesh(1, devices=jax.devices()[:1]))
    places = shardings(config, model.mesh)
    return model, *(jax.device_put(model.init(jax.random.key(seed)), places) for seed in (0, 1))


def count(tree):
    """The number of elements in all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


PROGRAMS = {}  # compiled once for all tests


def begin(tiny, config=CONFIG, widths=(4, 8), teachers=None, seeds=(0, 1, 2)):
    """A run whose general teacher is another model; its other teachers are equal to the student."""
    model, student, general = tiny
    rows = schedule.batch_rows(config)
    prompters = {name: Prompter(seeds[i], widths, rows[name]) for i, name in enumerate(config.branches)}
    teachers = teachers or {name: general if name == "recovery" else student for name in config.branches}
    run = make_run(config, model, student, teachers, prompters)
    if config.compute.offload == "off" and config.optimizer.trained == "all":  # else a run's programs hold its arrays
        run.programs = PROGRAMS.setdefault(repr(config), run.programs)
        run.programs._params = student
    return run


def compilations(programs):
    """The compilations of this run's programs."""
    return {**{f"select {n}": f._cache_size() for n, f in programs.selecting.items()},
            **{f"update {n}": f._cache_size() for n, f in programs.updates.items()}}  # fmt: skip


def shared_compilations(tiny):
    """The compilations of the programs that all runs on a mesh share."""
    parts = vars(generate.programs(tiny[0].mesh)) | {"score": scoring(tiny[0].mesh)}
    flat = {name: part.values() if isinstance(part, dict) else [part] for name, part in parts.items()}
    return {name: sum(p._cache_size() for p in part) for name, part in flat.items() if name not in ("grow", "keep")}


def scored(model, params, batch):
    """Log-probabilities of a batch's answers from one forward pass of all rows."""
    return score(model, params, batch.rollout.after(batch.prompts), 0)["log_prob"]


def test_two_cycles_compile_each_program_once_per_shape(tiny):
    run = begin(tiny)
    state = run.go()
    assert int(state.step) == 8
    before, shared = compilations(run.programs), shared_compilations(tiny)
    assert all(n <= 2 for n in before.values()), "two widths of answers"
    longer = dataclasses.replace(CONFIG, steps=16)
    run.programs.setup = dataclasses.replace(run.programs.setup, config=longer)
    run.go(Watcher(), state)
    run.programs.setup = dataclasses.replace(run.programs.setup, config=CONFIG)
    assert sum(compilations(run.programs).values()) <= sum(before.values()) + 2, "a width not seen before, at most"
    assert shared_compilations(tiny)["advance"] == shared["advance"] <= 2
    assert all(accumulator.add._cache_size() <= 4 for accumulator in run.programs.accumulators.values())


def test_one_shape_compiles_once(tiny):
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(ROLLOUT, smallest_bucket=8))
    before = shared_compilations(tiny)
    run = begin(tiny, config, widths=(8,))
    run.go()
    assert set(compilations(run.programs).values()) == {1}
    added = {name: n - before[name] for name, n in shared_compilations(tiny).items()}
    assert added["score"] <= 4, "the student's reading and the teachers'; rows of 8 slots, and of 16"
    assert all(n <= 1 for name, n in added.items() if name != "score"), added
    begin(tiny, config, widths=(8,)).go()
    assert shared_compilations(tiny) == {name: n + added[name] for name, n in before.items()}


def test_programs_have_the_names_of_branches(tiny):
    run = begin(tiny)
    names = {name: update.__wrapped__.__name__ for name, update in run.programs.updates.items()}
    assert names == {"recovery": "recovery_update", "review": "review_update"}


def test_each_branch_has_its_own_stream_and_teacher(tiny):
    run, watcher = begin(tiny), Watcher(last=8)
    run.go(watcher)
    assert [r.phase for r in watcher.records] == ["recovery"] * 3 + ["review"] + ["recovery"] * 3 + ["review"]
    assert [branch.prompts.served for branch in run.branches.values()] == [6, 2]
    first = watcher.records[0]
    batch = first.batches["recovery"]
    np.testing.assert_allclose(batch.log_probs.teacher, scored(tiny[0], tiny[2], batch), atol=1e-5)
    assert float(first.metrics["gap_abs_mean"]) > 0.1, "the general teacher is another model"
    assert set(first.seconds) == {"rollout", "score", "select", "update", "other"}


@pytest.mark.slow
def test_three_branches_alternate_in_the_order_of_the_config(tiny):
    """Two domains, each with its own specialist: separate streams, teachers, updates and moments."""
    law = BranchConfig(Stream("l"), "models/law", selection=SelectionConfig("positive_gap"), steps=2)
    config = dataclasses.replace(
        CONFIG, steps=12, branches={**CONFIG.branches, "law": law}, method=Method(moments="separate")
    )
    model, student, general = tiny
    lawyer = jax.tree.map(lambda p: p + 0.05, student)
    run, watcher = begin(tiny, config, teachers={"recovery": general, "review": student, "law": lawyer}), Watcher()
    state = run.go(watcher)
    cycle = ["recovery"] * 3 + ["review"] + ["law"] * 2
    assert [r.phase for r in watcher.records] + [schedule.phase(config, 11)] == cycle * 2
    assert {name: int(adam.count) for name, adam in state.moments.items()} == {"recovery": 6, "review": 2, "law": 4}
    assert [branch.prompts.served for branch in run.branches.values()] == [6, 2, 4]
    batch = watcher.records[4].batches["law"]
    np.testing.assert_allclose(batch.log_probs.teacher, scored(model, lawyer, batch), atol=1e-5)
    assert schedule.phases(config) == {"recovery": 1 / 2, "review": 1 / 6, "law": 1 / 3}
    mixed = dataclasses.replace(
        config,
        steps=2,
        method=Method(schedule="mixed", conflict="pcgrad"),
        rollout=dataclasses.replace(ROLLOUT, batch_size=12),
    )
    watcher = Watcher(last=2)
    begin(tiny, mixed).go(watcher)
    rows = {name: len(batch.index) for name, batch in watcher.records[1].batches.items()}
    assert rows == {"recovery": 6, "review": 2, "law": 4}
    assert set(watcher.records[1].metrics) >= set(rows)


def test_a_mixed_step_uses_both_streams_and_one_update(tiny):
    wide = dataclasses.replace(ROLLOUT, smallest_bucket=8)
    config = dataclasses.replace(CONFIG, steps=3, method=Method(schedule="mixed"), rollout=wide)
    run, watcher = begin(tiny, config, widths=(8,)), Watcher(milestones=(3,))
    state = run.go(watcher)
    assert int(state.step) == 3 and int(state.moments["shared"].count) == 3
    assert [branch.prompts.served for branch in run.branches.values()] == [3, 3]
    record = watcher.records[1]
    assert record.phase == "mixed" and list(record.batches) == ["recovery", "review"]
    assert [len(batch.index) for batch in record.batches.values()] == [3, 1], "the batch of 4 is split 3 : 1"
    lengths = [int(jnp.sum(batch.rollout.lengths)) for batch in record.batches.values()]
    assert int(record.metrics["response_tokens"]) == sum(lengths)
    assert "sampler_gap" not in record.metrics["recovery"], "compared in the first step of sixteen"
    assert [call[1] for call in watcher.calls if call[0] == "log"] == [0, 1, 2], "each step logged once"


def test_distillation_on_a_teachers_answers(tiny):
    """Sequence-level distillation for comparison: the teacher samples, and the loss is cross-entropy."""
    every = {"objective": "cross_entropy", "selection": SelectionConfig(mass=1.0)}
    config = train_config(
        every, {"objective": "cross_entropy"}, steps=1, method=Method(answers="teacher"), rollout=ROLLOUT,
        optimizer=CONFIG.optimizer,
    )  # fmt: skip
    run, watcher = begin(tiny, config), Watcher(milestones=(1,))
    model, student, _ = tiny
    run.go(watcher)
    batch, metrics = watcher.records[0].batches["recovery"], watcher.records[0].metrics
    np.testing.assert_allclose(batch.rollout.log_probs, batch.log_probs.teacher, atol=1e-5)
    sums = jnp.sum(scored(model, student, batch), 1)
    assert float(metrics["loss"]) == pytest.approx(2 * float(jnp.mean(-sums / batch.rollout.lengths)), rel=1e-5)
    assert "sampler_gap" not in metrics and not run.programs.setup.trusts_sampler
    sampled = train_config(steps=1, method=Method(answers="teacher"), rollout=ROLLOUT, optimizer=CONFIG.optimizer)
    with pytest.raises(UserError, match=r"branches\.recovery\.objective is 'sampled_token'.* give cross_entropy"):
        resolve(sampled, jax.devices()[:1])


def test_a_warm_up_is_the_loop_on_given_answers(tiny):
    """A step on answers that were sampled before equals the step that samples them."""
    method = Method(importance_gate=(0.5, 2.0))
    config = dataclasses.replace(CONFIG, warm_up=WarmUp(3, learning_rate=3e-2), method=method)
    warm_up, rest = schedule.parts(config)
    assert rest == config and (schedule.first_step(warm_up), schedule.first_step(rest)) == (0, 3)
    assert warm_up.steps == 3 and warm_up.optimizer == dataclasses.replace(CONFIG.optimizer, learning_rate=3e-2)
    assert [schedule.phase(warm_up, step) for step in range(3)] == ["warm_up/recovery"] * 3
    assert [schedule.phase(rest, step) for step in range(3, 8)] == ["recovery"] * 3 + ["review", "recovery"]
    sampling, watcher = begin(tiny, dataclasses.replace(warm_up, steps=1)), Watcher(milestones=(1,))
    wanted = sampling.go(watcher)
    batch = watcher.records[0].batches["recovery"]

    class Answered(Prompter):
        def __next__(self):
            prompts = super().__next__()
            return prompts.replace(answers=jax.tree.map(np.asarray, batch.rollout.replace(residuals=())))

    given = begin(tiny, dataclasses.replace(warm_up, steps=1))
    answered = dataclasses.replace(given.branches["recovery"], prompts=Answered(0))
    given.branches = given.branches | {"recovery": answered}
    jax.tree.map(np.testing.assert_array_equal, given.go().params, wanted.params)


def with_student_logprobs(way):
    return dataclasses.replace(CONFIG, rollout=dataclasses.replace(ROLLOUT, student_logprobs=way))


def test_log_probs_from_sampling_equal_a_forward_pass(tiny):
    """Without forward passes the results differ only by rounding, and the comparison steps are done."""
    states, gaps = [], []
    for way in ("forward", "sampler", "auto"):
        watcher = Watcher(last=8)
        states.append(begin(tiny, with_student_logprobs(way)).go(watcher))
        gaps.append({r.step: float(r.metrics["sampler_gap"]) for r in watcher.records if "sampler_gap" in r.metrics})
    assert [list(g) for g in gaps] == [list(range(8)), [0], [0]], "float32: auto is the sampler"
    assert all(gap < 1e-5 for g in gaps for gap in g.values())
    for other in states[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), other.params, states[0].params)


@pytest.mark.slow
@pytest.mark.parametrize("schedule, shrinks", [("alternate", True), ("mixed", False)])
def test_remat_rollout_gives_the_same_gradient(tiny, schedule, shrinks):
    """And the residual stream is freed before the next step."""
    rollout = dataclasses.replace(ROLLOUT, shrinks=shrinks)
    states = []
    for remat in ("block", "rollout"):
        compute, method = Compute(remat=remat), Method(schedule=schedule)
        config, watcher = dataclasses.replace(CONFIG, method=method, rollout=rollout, compute=compute), Watcher()
        model = dataclasses.replace(tiny[0], remat=remat)
        states.append(begin((model, *tiny[1:]), config).go(watcher))
        assert all(batch.rollout.residuals == () for r in watcher.records for batch in r.batches.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), states[1].params, states[0].params)


def test_remat_rollout_needs_log_probs_from_sampling():
    config = dataclasses.replace(CONFIG, compute=Compute(remat="rollout", matmul="bfloat16"))
    with pytest.raises(UserError, match=r"compute\.remat is 'rollout'.* in bfloat16 .* set that to sampler, or remat"):
        resolve(config, jax.devices()[:1])
    trusting = dataclasses.replace(config, rollout=dataclasses.replace(ROLLOUT, student_logprobs="sampler"))
    assert resolve(trusting, jax.devices()[:1]).keep_residuals
    check_remat(dataclasses.replace(CONFIG, compute=Compute(remat="rollout")), "float32")


def test_a_large_sampler_gap_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(recorder, "LARGEST_SAMPLER_GAP", 0.0)
    with pytest.raises(UserError, match=r"config\.rollout\.student_logprobs: at step 0 .* set it to \"forward\""):
        begin(tiny).go()
    bfloat16 = dataclasses.replace(CONFIG, compute=Compute(matmul="bfloat16"))
    assert not resolve(bfloat16, jax.devices()[:1]).trusts_sampler


def test_recovery_steps_do_not_depend_on_the_domain_stream(tiny):
    """Recovery steps of the first cycle are bit-identical with other domain prompts and another domain teacher."""
    after, three = [], dataclasses.replace(CONFIG, steps=3)
    for seed in (1, 2):
        other = jax.tree.map(lambda p, seed=seed: p * seed, tiny[1])
        run = begin(tiny, three, teachers={"recovery": tiny[2], "review": other}, seeds=(0, seed))
        after.append(run.go().params)
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny):
    whole = begin(tiny).go()
    run = begin(tiny)
    half = run.go(Watcher(milestones=(5,), end_at=5))
    assert int(half.step) == 5
    rest = run.go(state=half)
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)


@pytest.mark.slow
def test_two_answers_to_each_prompt(tiny):
    """A step on 2 prompts with 2 answers each; a resumed run is the same, and so is one in other micro-batches."""
    rollout = dataclasses.replace(ROLLOUT, batch_size=2, answers_per_prompt=2)
    config = dataclasses.replace(CONFIG, rollout=rollout, steps=3)

    def made(config):
        model, student, general = tiny
        streams = {name: SeveralAnswers(i, (4, 8), 4) for i, name in enumerate(config.branches)}
        return make_run(config, model, student, {"recovery": general, "review": student}, streams)

    once, watcher = made(config), Watcher(last=3)
    state = once.go(watcher)
    for record in watcher.records:
        (batch,) = record.batches.values()
        assert batch.rollout.tokens.shape[0] == 4
        np.testing.assert_array_equal(batch.index[::2], batch.index[1::2])
        pairs = np.asarray(batch.rollout.tokens).reshape(2, 2, -1)
        assert (pairs[:, 0] != pairs[:, 1]).any()
    twice = made(config)
    half = twice.go(Watcher(milestones=(2,), last=3, end_at=2))
    jax.tree.map(np.testing.assert_array_equal, twice.go(state=half).params, state.params)
    small = made(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, micro_batch=1))).go()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), small.params, state.params)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_masks_and_stored_gradient(tiny):
    """UC-MOPD's random mask, with a top-K objective in one branch, against which the other is projected."""
    masks = {"weights": ("uc_mopd", "iw_opd"), "steps": 1}
    recovery = masks | {"project_against": "review", "clip_norm": 2.0}
    config = train_config(recovery, masks | {"objective": "teacher_top_k(k=5)"}, steps=4, rollout=ROLLOUT,
                          optimizer=CONFIG.optimizer)  # fmt: skip
    once = begin(tiny, config).go()
    twice = begin(tiny, config)
    state = twice.go(Watcher(milestones=(2,), last=4, end_at=2))
    assert int(state.step) == 2
    state = twice.go(state=state)
    jax.tree.map(np.testing.assert_array_equal, state, once)
    plain = begin(tiny, dataclasses.replace(config, branches=CONFIG.branches)).go()
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), once.params, plain.params)
    assert max(jax.tree.leaves(moved)) > 1e-3, "the weights have an effect"


def test_every_step_is_logged_once_and_before_a_pause(tiny):
    watcher = Watcher(milestones=(2, 5), last=8)
    begin(tiny).go(watcher)
    assert watcher.calls == [("log", 0), ("log", 1), ("milestone", 2), ("log", 2), ("log", 3), ("log", 4),
                             ("milestone", 5), ("log", 5), ("log", 6), ("log", 7), ("milestone", 8)]  # fmt: skip


def test_answers_are_cut_to_the_bucket_of_the_longest_one():
    answers = Rollout(
        jnp.arange(64).reshape(2, 32), jnp.array([3, 9]), jnp.ones((2, 32)), jnp.zeros(2), jnp.ones(2, bool)
    )
    cut = programs_module._cut_to_bucket(answers, 4)
    assert cut.tokens.shape == cut.log_probs.shape == (2, 16)
    np.testing.assert_array_equal(cut.tokens, answers.tokens[:, :16])
    assert programs_module._cut_to_bucket(answers, 64).tokens.shape == (2, 32)


def test_separate_moments(tiny):
    config = dataclasses.replace(CONFIG, method=Method(moments="separate"))
    state = begin(tiny, config).go()
    assert (int(state.moments["recovery"].count), int(state.moments["review"].count)) == (6, 2)


def test_the_average_of_the_weights_changes_no_update(tiny):
    """After three updates it has their weights in proportion to .81, .9 and 1, and none of the start."""
    steps = {n: begin(tiny, dataclasses.replace(CONFIG, steps=n)).go() for n in (1, 2, 3)}
    config = dataclasses.replace(CONFIG, steps=3, optimizer=dataclasses.replace(CONFIG.optimizer, average=0.9))
    state = begin(tiny, config).go()
    jax.tree.map(np.testing.assert_array_equal, state.params, steps[3].params)

    def close(average, *params):
        wanted = sum(w * np.asarray(p, float) for w, p in zip((0.81, 0.9, 1.0), params, strict=True)) / 2.71
        np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-6)

    jax.tree.map(close, state.average, *(steps[n].params for n in (1, 2, 3)))
    assert state.evaluated is not state.params and steps[3].evaluated is steps[3].params


# ------------------------------------------------------------------------------- trained and frozen


def test_frozen_parameters_have_no_gradient_and_no_moments(tiny):
    """Only matching parameters are in the state and change, by the same update as if all parameters were trained."""
    student = tiny[1]
    rule = dataclasses.replace(CONFIG.optimizer, trained=r"layers\.mlp\.", clip_norm=None)
    one = dataclasses.replace(CONFIG, steps=1)
    run = begin(tiny, dataclasses.replace(one, optimizer=rule))
    assert set(run.state.params) == {"layers"} and set(run.state.params["layers"]) == {"mlp"}
    moments = run.state.moments["shared"]
    assert count(moments.mu) == count(moments.nu) == count(student["layers"]["mlp"]) < count(student) / 2
    state = run.go()
    everything = begin(tiny, dataclasses.replace(one, optimizer=dataclasses.replace(rule, trained="all"))).go()
    expected = everything.params["layers"]["mlp"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params["layers"]["mlp"], expected)
    moved = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, {"layers": {"mlp": student["layers"]["mlp"]}}
    )
    assert min(jax.tree.leaves(moved)) > 0
    params = run.programs.params(state)
    np.testing.assert_array_equal(params["embedding"], student["embedding"])
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up"]["kernel"], state.params["layers"]["mlp"]["up"]["kernel"]
    )


@pytest.mark.slow
def test_routers_of_experts_are_frozen_by_default():
    """In one cycle every other parameter changes."""
    fields = dict(model_type="mixtral", vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=2)
    fields |= dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, initializer_range=0.6)
    model = Model(from_hf(fields), mesh=make_mesh(1, devices=jax.devices()[:1]))
    places = shardings(model.config, model.mesh)
    student, general = (jax.device_put(model.init(jax.random.key(seed)), places) for seed in (0, 1))
    run = make_run(
        dataclasses.replace(CONFIG, steps=4),
        model,
        student,
        {"recovery": general, "review": student},
        {"recovery": Prompter(0), "review": Prompter(1)},
    )
    before = jax.tree.map(np.array, run.programs.params(run.state))
    after = run.programs.params(run.go())
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert changed["layers"]["mlp"].pop("router") == {"kernel": False}
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("rule", ["final_norm|embedding", "attention_norm|head"])
def test_any_subset_of_the_parameters_can_be_trained(tiny, rule):
    """Subsets without layers and mixed subsets: after two cycles, the other parameters are unchanged."""
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, trained=rule))
    run = begin(tiny, config)
    before = jax.tree.map(np.array, run.programs.params(run.state))
    state = run.go()
    after = run.programs.params(state)
    kept = jax.tree_util.tree_map_with_path(
        lambda path, a, b: bool(np.array_equal(a, b)) == (not any(w in str(path) for w in rule.split("|"))),
        before,
        after,
    )
    assert all(jax.tree.leaves(kept)), kept


def test_a_pattern_without_match_is_an_error(tiny):
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, trained="mpl"))
    with pytest.raises(UserError, match=r"config\.optimizer\.trained is 'mpl', which matches no parameter name;"):
        begin(tiny, config)


# ---------------------------------------------------------------------------------------- offload


def device_bytes():
    """The size of all arrays in the devices' memory."""
    live = (a for a in jax.live_arrays() if not a.is_deleted())
    return sum(a.nbytes for a in live if a.sharding.memory_kind != "pinned_host")


@pytest.mark.parametrize("when", ["ahead", "late"])
def test_offloaded_arrays_use_no_device_memory(tiny, when, monkeypatch):
    """In every step, the other teacher and the moments are on no device, even if they are referenced."""
    begin(tiny).go()  # all constants of programs are made
    seen = {}

    def measured(config):
        run, sizes = begin(tiny, config), []
        real = generate.answers

        def answers(*args, **options):
            sizes.append(device_bytes())
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(generate, "answers", answers)
            before = device_bytes()
            run.go()
        return sizes[0] - before, sizes[-1] - before

    for offload in ("off", when):
        seen[offload] = measured(dataclasses.replace(CONFIG, compute=Compute(offload=offload)))
    params = 4 * count(tiny[1])
    # A run that offloads starts with both teachers on the host. When a rollout starts, one of them is on the devices
    # (+1), and the two moments of each parameter are not (-2). With `off`, nothing changes.
    for off, offloaded in zip(seen["off"], seen[when], strict=True):
        assert off - offloaded == pytest.approx(params, rel=0.02), (seen, params)


@pytest.mark.parametrize(
    "when, schedule", [("ahead", "alternate"), pytest.param("late", "mixed", marks=pytest.mark.slow)]
)
def test_offloading_does_not_change_results(tiny, when, schedule):
    """Results are bit-identical, and arrays are on the devices when they are used."""
    config = dataclasses.replace(CONFIG, steps=4, method=Method(schedule=schedule))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, average=0.9))
    plain = begin(tiny, config).go()
    other = begin(tiny, dataclasses.replace(config, compute=Compute(offload=when))).go()
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(other)}
    assert "pinned_host" not in kinds
    jax.tree.map(np.testing.assert_array_equal, other.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, other.moments, plain.moments)
    jax.tree.map(np.testing.assert_array_equal, other.average, plain.average)


@pytest.mark.parametrize("when, order", [("ahead", ["moments", "gradient"]), ("late", ["gradient", "moments"])])
def test_moments_are_fetched_before_or_after_the_gradient(tiny, when, order, monkeypatch):
    run = begin(tiny, dataclasses.replace(CONFIG, steps=2, compute=Compute(offload=when)))
    events = []

    def noted(name, call):
        return lambda *args: events.append(name) or call(*args)

    monkeypatch.setattr(run.programs, "_gradient", noted("gradient", run.programs._gradient))
    moved = noted("moments", programs_module.OffloadSlot.fetch)
    monkeypatch.setattr(programs_module.OffloadSlot, "fetch", lambda self: moved(self) if self._on_host else None)
    run.go()
    assert events == order * 2


# ------------------------------------------------------------------------------- other objectives


@pytest.mark.parametrize(
    "name, compute",
    [
        ("reverse_kl", Compute(offload="late")),
        pytest.param("jsd(beta=0.1)", Compute(logits_chunk=8), marks=pytest.mark.slow),
        pytest.param("binned_top_k(k=5)", Compute(offload="late", logits_chunk=8), marks=pytest.mark.slow),
    ],
)
def test_objectives_over_many_words_with_offloading_and_chunks(tiny, name, compute):
    config = train_config(
        {"objective": name}, {"objective": name}, steps=4, rollout=ROLLOUT, optimizer=CONFIG.optimizer, compute=compute
    )
    watcher = Watcher(last=4)
    state = begin(tiny, config).go(watcher)
    losses = [float(record.metrics["loss"]) for record in watcher.records]
    assert losses[0] > 0.1 and all(np.isfinite(losses))
    assert all(record.metrics["skipped"] == 0 for record in watcher.records)
    assert all(record.batches[record.phase].teacher.tokens == {} for record in watcher.records)
    plain = dataclasses.replace(config, compute=Compute())
    expected = begin(tiny, plain).go()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params)
