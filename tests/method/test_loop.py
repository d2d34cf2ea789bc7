"""The loop itself, on a tiny random model: the order of phases, and each program compiled once per shape."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.config.schema import Compute, Method, Optimizer, Phase, RolloutConfig, Stream, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method import loop
from camopd_jax.method.loop import Branch, batch_rows, compile_programs, cut_to_bucket, phase_at, run
from camopd_jax.method.optimizer import init_state
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.rollout import generate, scoring
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import PromptBatch, Prompts, Rollout

CONFIG = TrainConfig(
    "g", "s", Stream("g"), Stream("d"), steps=8,
    rollout=RolloutConfig(batch_size=4, max_prompt_tokens=8, max_response_tokens=8, smallest_bucket=4, score_batch=4),
    optimizer=Optimizer(learning_rate=1e-2, micro_batch=2),
)  # fmt: skip


@pytest.mark.parametrize(
    "recovery, review, order",
    [(3, 1, "ggggdgggd"), (1, 1, "gdgdgdgdg"), (0, 1, "ddddddddd"), (2, 0, "ggggggggg"), (1, 2, "gddgddgdd")],
)
def test_the_order_of_phases(recovery, review, order):
    method = Method(recovery_steps=recovery, review_steps=review)
    made = "".join("g" if phase_at(i, method) == "recovery" else "d" for i in range(9))
    assert made == ("gggdgggdg" if (recovery, review) == (3, 1) else order)


class Prompter:
    """An endless stream of random prompts; widths as given, over and over."""

    def __init__(self, seed, widths, rows=4):
        self.random, self.widths, self.served = np.random.default_rng(seed), itertools.cycle(widths), 0
        self.rows = rows

    def __next__(self):
        self.served += 1
        width = next(self.widths)
        n = self.rows
        prompts = Prompts(self.random.integers(0, 14, (n, width)).astype(np.int32), np.full(n, width, np.int32))
        return PromptBatch(prompts, prompts, np.arange(n, dtype=np.int32) + n * self.served)


class Watcher:
    """Writes down what the loop tells, and can end it."""

    def __init__(self, milestones=(), end_at=None):
        self.outcomes, self.calls, self.milestones, self.end_at = [], [], milestones, end_at

    def log(self, outcome):
        self.outcomes.append(outcome)
        self.calls.append(("log", outcome.step))

    def pauses_after(self, steps_done):
        return steps_done in self.milestones or steps_done == CONFIG.steps

    def pause(self, steps_done, state):
        self.calls.append(("milestone", steps_done))
        assert int(state.step) == steps_done
        return steps_done == self.end_at


@pytest.fixture(scope="module")
def tiny():
    config = from_hf(dict(model_type="llama", vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6))  # fmt: skip
    model = Model(config, mesh=make_mesh(1, devices=jax.devices()[:1]))
    places = shardings(config, model.mesh)
    return model, *(jax.device_put(model.init(jax.random.key(seed)), places) for seed in (0, 1))


PROGRAMS = {}  # compiled once for all tests


def begin(tiny, config=CONFIG, widths=(4, 8)):
    model, student, general = tiny
    state = init_state(jax.tree.map(jnp.copy, student), config.method.moments)
    rows = batch_rows(config)
    branches = {
        "recovery": Branch(Prompter(0, widths, rows["recovery"]), model, general),
        "review": Branch(Prompter(1, widths, rows["review"]), model, student),
    }
    if repr(config) not in PROGRAMS:
        PROGRAMS[repr(config)] = compile_programs(config, model, (2,), state)
    return branches, PROGRAMS[repr(config)], state


def compilations(programs):
    """Of this run's own programs."""
    return {**{f"select {n}": f._cache_size() for n, f in programs.select.items()},
            **{f"update {n}": f._cache_size() for n, f in programs.update.items()}}  # fmt: skip


def shared_compilations(tiny):
    """Of the programs that all runs on a mesh share."""
    learning = begin(tiny)[1].learning
    parts = vars(generate.programs(tiny[0].mesh))
    parts = parts | {"score": scoring.scoring(tiny[0].mesh), "add_gradient": learning.add}
    flat = {name: part.values() if isinstance(part, dict) else [part] for name, part in parts.items()}
    return {name: sum(p._cache_size() for p in part) for name, part in flat.items() if name not in ("grow", "keep")}


def run_state(tiny, config):
    return init_state(jax.tree.map(jnp.copy, tiny[1]), config.method.moments)


def scored(config, model, params, part):
    """Log-probabilities of a part's answers by a pass of the whole batch."""
    rollout = part.rollout
    return score(model, params, part.prompts, rollout.tokens, rollout.lengths, config.compute.logits_chunk)


def test_two_cycles_compile_each_program_once_per_shape(tiny):
    branches, programs, state = begin(tiny)
    state = run(CONFIG, branches, programs, state, Watcher())
    assert int(state.step) == 8
    before, shared = compilations(programs), shared_compilations(tiny)
    assert all(n <= 2 for n in before.values()), "two widths of answers"
    run(dataclasses.replace(CONFIG, steps=16), branches, programs, state, Watcher())
    assert sum(compilations(programs).values()) <= sum(before.values()) + 2, "a width not seen before, at most"
    after = shared_compilations(tiny)
    assert after["advance"] == shared["advance"] <= 2 and after["add_gradient"] <= 4


def test_one_shape_compiles_once(tiny):
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, smallest_bucket=8))
    branches, programs, state = begin(tiny, config, widths=(8,))
    before = shared_compilations(tiny)
    run(config, branches, programs, state, Watcher())
    assert set(compilations(programs).values()) == {1}
    added = {name: n - before[name] for name, n in shared_compilations(tiny).items()}
    assert added["score"] <= 2, "student and teachers are scored by one program; rows of 8 slots, and of 16"
    assert all(n <= 1 for name, n in added.items() if name != "score"), added
    run(dataclasses.replace(config, steps=16), branches, programs, run_state(tiny, config), Watcher())
    assert shared_compilations(tiny) == {name: n + added[name] for name, n in before.items()}


def test_each_phase_takes_from_its_own_stream_and_its_own_teacher(tiny):
    branches, programs, state = begin(tiny)
    watcher = Watcher()
    run(CONFIG, branches, programs, state, watcher)
    assert [o.phase for o in watcher.outcomes] == ["recovery"] * 3 + ["review"] + ["recovery"] * 3 + ["review"]
    assert (branches["recovery"].prompts.served, branches["review"].prompts.served) == (6, 2)
    first = watcher.outcomes[0]
    part = first.parts["recovery"]
    again = scored(CONFIG, tiny[0], tiny[2], part)
    np.testing.assert_allclose(part.scores.teacher, again, atol=1e-5)
    assert float(first.metrics["gap_abs_mean"]) > 0.1, "the general teacher is another model"
    assert set(first.seconds) == {"rollout", "score", "select", "update", "other"}


def test_a_mixed_step_takes_both_streams_and_one_update(tiny):
    wide = dataclasses.replace(CONFIG.rollout, smallest_bucket=8)
    config = dataclasses.replace(CONFIG, steps=3, method=Method(schedule="mixed"), rollout=wide)
    branches, programs, state = begin(tiny, config, widths=(8,))
    watcher = Watcher(milestones=(3,))
    state = run(config, branches, programs, state, watcher)
    assert int(state.step) == 3 and int(state.moments["shared"].count) == 3
    assert (branches["recovery"].prompts.served, branches["review"].prompts.served) == (3, 3)
    outcome = watcher.outcomes[1]
    assert outcome.phase == "mixed" and list(outcome.parts) == ["recovery", "review"]
    assert [len(part.index) for part in outcome.parts.values()] == [3, 1], "the batch of 4 is split 3 : 1"
    lengths = [int(jnp.sum(part.rollout.lengths)) for part in outcome.parts.values()]
    assert int(outcome.metrics["response_tokens"]) == sum(lengths)
    assert "sampler_gap" not in outcome.metrics["recovery"], "compared in the first step of sixteen"
    assert [call[1] for call in watcher.calls if call[0] == "log"] == [0, 1, 2], "each step told once"


def test_a_teachers_answers_are_learnt_by_heart(tiny):
    """The control of sequence-level distillation: the teacher samples, and the update is cross-entropy."""
    method = Method(answers="teacher", recovery=Phase(mass=1.0))
    config = dataclasses.replace(CONFIG, steps=1, method=method)
    branches, programs, state = begin(tiny, config)
    model, student, _ = tiny
    watcher = Watcher(milestones=(1,))
    run(config, branches, programs, state, watcher)
    part, metrics = watcher.outcomes[0].parts["recovery"], watcher.outcomes[0].metrics
    np.testing.assert_allclose(part.rollout.log_probs, part.scores.teacher, atol=1e-5)
    ours = scored(config, model, student, part)
    assert float(metrics["loss"]) == pytest.approx(float(jnp.mean(-jnp.sum(ours, 1) / part.rollout.lengths)), rel=1e-5)
    assert "sampler_gap" not in metrics and not programs.trusts_sampler


def with_student_logprobs(way):
    return dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, student_logprobs=way))


def test_the_samplers_logprobs_are_the_students(tiny):
    """Spared forwards change nothing beyond float error, and what is compared is compared."""
    states, gaps = [], []
    for way in ("forward", "sampler", "auto"):
        branches, programs, state = begin(tiny, with_student_logprobs(way))
        watcher = Watcher()
        states.append(run(with_student_logprobs(way), branches, programs, state, watcher))
        gaps.append({o.step: float(o.metrics["sampler_gap"]) for o in watcher.outcomes if "sampler_gap" in o.metrics})
    assert [list(g) for g in gaps] == [list(range(8)), [0], [0]], "float32: auto is the sampler"
    assert all(gap < 1e-5 for g in gaps for gap in g.values())
    for other in states[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), other.params, states[0].params)


@pytest.mark.parametrize("schedule, shrinks", [("alternate", True), ("mixed", False)])
def test_a_gradient_that_begins_with_the_rollout_is_the_same(tiny, schedule, shrinks):
    """And what was kept for it is given up before the next step."""
    rollout = dataclasses.replace(CONFIG.rollout, shrinks=shrinks)
    states = []
    for remat in ("block", "rollout"):
        config = dataclasses.replace(
            CONFIG, method=Method(schedule=schedule), rollout=rollout, compute=Compute(remat=remat)
        )
        branches, programs, state = begin(tiny, config)
        watcher = Watcher()
        states.append(run(config, branches, programs, state, watcher))
        assert all(part.rollout.residuals == () for o in watcher.outcomes for part in o.parts.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), states[1].params, states[0].params)


def test_a_gradient_begins_with_no_rollout_that_is_not_trusted(tiny):
    bfloat16 = Model(tiny[0].config, mesh=tiny[0].mesh, dtype="bfloat16", remat="rollout")
    config, state = dataclasses.replace(CONFIG, compute=Compute(remat="rollout")), begin(tiny)[2]
    with pytest.raises(UserError, match=r"compute\.remat is 'rollout'.* in bfloat16 .* set that to sampler, or remat"):
        compile_programs(config, bfloat16, (2,), state)
    trusting = dataclasses.replace(config, rollout=dataclasses.replace(CONFIG.rollout, student_logprobs="sampler"))
    assert compile_programs(trusting, bfloat16, (2,), state).decode.keep_residuals


def test_a_sampler_that_is_off_is_not_trusted(tiny, monkeypatch):
    monkeypatch.setattr(loop, "LARGEST_SAMPLER_GAP", 0.0)
    branches, programs, state = begin(tiny)
    with pytest.raises(UserError, match=r"config\.rollout\.student_logprobs: at step 0 .* set it to \"forward\""):
        run(CONFIG, branches, programs, state, Watcher())
    bfloat16 = Model(tiny[0].config, mesh=tiny[0].mesh, dtype="bfloat16")
    assert not compile_programs(CONFIG, bfloat16, (2,), state).trusts_sampler


def test_recoveries_do_not_depend_on_the_domain_stream(tiny):
    """The first cycle's recoveries, with other domain prompts and another domain teacher: the same bits."""
    after = []
    for seed in (1, 2):
        branches, programs, state = begin(tiny)
        other = jax.tree.map(lambda p, seed=seed: p * seed, tiny[1])
        branches["review"] = Branch(Prompter(seed, (4, 8)), tiny[0], other)
        after.append(run(dataclasses.replace(CONFIG, steps=3), branches, programs, state, Watcher()).params)
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_a_run_in_two_parts_is_one_run(tiny):
    branches, programs, state = begin(tiny)
    whole = run(CONFIG, branches, programs, state, Watcher())
    branches, programs, state = begin(tiny)
    half = run(CONFIG, branches, programs, state, Watcher(milestones=(5,), end_at=5))
    assert int(half.step) == 5
    rest = run(CONFIG, branches, programs, half, Watcher())
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)


def test_every_step_is_logged_before_a_milestone_and_none_twice(tiny):
    branches, programs, state = begin(tiny)
    watcher = Watcher(milestones=(2, 5))
    run(CONFIG, branches, programs, state, watcher)
    assert watcher.calls == [("log", 0), ("log", 1), ("milestone", 2), ("log", 2), ("log", 3), ("log", 4),
                             ("milestone", 5), ("log", 5), ("log", 6), ("log", 7), ("milestone", 8)]  # fmt: skip


def test_answers_are_cut_to_the_bucket_of_the_longest():
    answers = Rollout(
        jnp.arange(64).reshape(2, 32), jnp.array([3, 9]), jnp.ones((2, 32)), jnp.zeros(2), jnp.ones(2, bool)
    )
    cut = cut_to_bucket(answers, 4)
    assert cut.tokens.shape == cut.log_probs.shape == (2, 16)
    np.testing.assert_array_equal(cut.tokens, answers.tokens[:, :16])
    assert cut_to_bucket(answers, 64).tokens.shape == (2, 32)


def test_the_separate_moments_run_too(tiny):
    config = dataclasses.replace(CONFIG, method=Method(moments="separate"))
    branches, programs, state = begin(tiny, config)
    state = run(config, branches, programs, state, Watcher())
    assert (int(state.moments["recovery"].count), int(state.moments["review"].count)) == (6, 2)


@pytest.mark.parametrize("when", ["ahead", "late"])
def test_what_waits_on_the_host_changes_nothing(tiny, when):
    """Teachers and moments in host memory while they are idle: the same bits, and they are there."""
    watcher, offloading = Watcher(), dataclasses.replace(CONFIG, compute=Compute(offload=when))
    branches, programs, state = begin(tiny)
    plain = run(CONFIG, branches, programs, state, Watcher())
    branches, _, state = begin(tiny)
    seen = set()

    def looked(name, of):
        """What `scoring.score` and `generate.answers` are given lies on the device."""
        real = getattr(*of)

        def call(model, params, *args, **options):
            seen.add((name, *{x.sharding.memory_kind for x in jax.tree.leaves(params)}))
            return real(model, params, *args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", looked("score", (scoring, "score")))
        moved, events = [], []

        def noted(name, of):
            """Notes each call, but not that of a teacher's copy."""

            def call(*args):
                if name == "gradient" or "shared" in args[0]:
                    events.append(name)
                return of(*args)

            return call

        patch.setattr(loop, "gradient", noted("gradient", loop.gradient))
        patch.setattr(loop, "on_devices", noted("moments", loop.on_devices))
        patch.setattr(loop, "on_host", lambda tree, f=loop.on_host: moved.append(f(tree)) or moved[-1])
        other = run(offloading, branches, programs, state, watcher)
    assert seen == {("score", "device")}
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(moved)}
    assert kinds == {"pinned_host"} and len(moved) == 2 + 8, "both teachers once, the moments before every rollout"
    assert events == {"ahead": ["moments", "gradient"], "late": ["gradient", "moments"]}[when] * CONFIG.steps
    jax.tree.map(np.testing.assert_array_equal, other.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, other.moments, plain.moments)
