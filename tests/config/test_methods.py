"""Every method has a valid config that differs from the others."""

import dataclasses

import jax
import pytest
from builders import train_config

from camopd_jax.config.identity import changed, to_json
from camopd_jax.config.methods import METHODS, QUICK, changes_of, description, method_of
from camopd_jax.config.schema import Method, Optimizer, RolloutConfig
from camopd_jax.method import schedule
from camopd_jax.method.setup import resolve

BASE = train_config(rollout=RolloutConfig(batch_size=64), optimizer=Optimizer(micro_batch=8))


def of(name):
    return changed(BASE, changes_of(name, BASE))


def test_each_method_is_a_different_run_with_the_same_budget():
    made = {name: of(name) for name in METHODS}
    assert made["camopd"] == BASE and BASE.method == Method()
    assert len({str(to_json(config)) for config in made.values()}) == len(METHODS)
    for config in made.values():
        # Not the same in teacher-top-k, minillm, speculative-kd and uc-mopd-explored
        answers = config.rollout.batch_size * config.rollout.answers_per_prompt
        sampled = dataclasses.replace(
            config.rollout, top_p=1.0, temperature=1.0, sampler="student", batch_size=answers, answers_per_prompt=1,
            exploration=None,
        )  # fmt: skip
        assert (config.steps, sampled, config.seed) == (BASE.steps, BASE.rollout, BASE.seed)
        rows = schedule.batch_rows(config)
        assert sum(rows[name] for name in schedule.active_branches(config, 0)) == 64
    assert set(QUICK) < set(METHODS)


@pytest.mark.parametrize(
    "name, wanted",
    [
        (
            "vanilla",
            {
                "schedule": "mixed",
                "recovery.steps": 1,
                "recovery.mass": 1,
                "review.mass": 1,
                "recovery.scale": 1,
            },
        ),
        ("mixed-3-1", {"schedule": "mixed", "recovery.steps": 3, "recovery.mass": 1, "recovery.scale": 1}),
        (
            "alternating",
            {"schedule": "alternate", "recovery.mass": 1, "review.mass": 1, "recovery.scale": 2},
        ),
        ("alternating-r1", {"schedule": "alternate", "recovery.mass": 1, "recovery.scale": 1}),
        (
            "selection",
            {"schedule": "mixed", "recovery.mass": 0.8, "review.mass": 0.8, "recovery.scale": 1},
        ),
        ("pull-2", {"schedule": "mixed", "recovery.mass": 1, "recovery.scale": 2}),
        ("camopd-1-1", {"recovery.steps": 1, "review.steps": 1, "recovery.mass": 0.8}),
        ("camopd-5-1", {"recovery.steps": 5, "review.steps": 1}),
        ("mass-0.6", {"recovery.mass": 0.6, "review.mass": 0.6}),
        (
            "half",
            {
                "recovery.keep": "fraction",
                "review.keep": "fraction",
                "recovery.mass": 0.5,
            },
        ),
        (
            "random",
            {"recovery.keep": "random", "review.keep": "random", "recovery.mass": 0.8},
        ),
        ("scores-swapped", {"recovery.by": "positive_gap", "review.by": "absolute_gap"}),
        ("moments", {"moments": "separate"}),
        ("pcgrad", {"schedule": "mixed", "conflict": "pcgrad", "recovery.mass": 1}),
        ("recovery-only", {"review.steps": 0}),
        ("review-only", {"recovery.steps": 0}),
        ("one-teacher", {"review.teacher": "general", "schedule": "mixed"}),
        (
            "distillation",
            {"answers": "teacher", "review.steps": 0, "recovery.scale": 1, "recovery.objective": "cross_entropy"},
        ),
        ("corrected-top-k", {"schedule": "mixed", "recovery.objective": "corrected_top_k", "recovery.weights": ()}),
        ("teacher-top-k", {"review.objective": "teacher_top_k", "schedule": "mixed"}),
        ("reopold", {"recovery.objective": "sampled_token", "recovery.weights": ("reopold",)}),
        ("no-teacher", {"schedule": "mixed", "review.weights": ("unlikely",), "review.mass": 1}),
        ("dn-mopd", {"schedule": "mixed", "balance": "gap_spread"}),
        ("clip-2-1", {"schedule": "alternate", "recovery.clip_norm": 2.0, "review.clip_norm": None}),
        ("up-mopd", {"recovery.project_against": "review", "review.project_against": "", "recovery.scale": 2}),
        (
            "recover",
            {
                "schedule": "alternate",
                "recovery.keep": "fraction",
                "recovery.steps": 1,
                "review.mass": 0.5,
                "review.objective": "reverse_kl",
            },
        ),
        ("minillm", {"schedule": "mixed", "recovery.objective": "minillm", "review.objective": "minillm"}),
        ("speculative-kd", {"schedule": "mixed", "recovery.objective": "forward_kl", "review.mass": 1}),
        ("uc-mopd-explored", {"schedule": "mixed", "recovery.weights": ("uc_mopd",), "review.keep": "density"}),
        ("dapo", {"normalise": "token", "review.weights": ("overlong",), "recovery.mass": 1}),
        ("replay-12", {"answers": "teacher", "schedule": "mixed", "recovery.steps": 1, "review.steps": 7}),
    ],
)
def test_a_method_has_the_settings_in_its_name(name, wanted):
    config = of(name)
    for field, value in wanted.items():
        branch, _, name = field.rpartition(".")
        block = config.branches[branch] if branch else config.method
        block = block.selection if name in ("mass", "keep", "by") else block
        assert getattr(block, name) == value, field


def test_every_objective_and_weight_of_a_method_exists():
    for name in METHODS:
        setup = resolve(of(name), jax.devices()[:1])
        assert list(setup.objectives) == list(setup.weights) == ["recovery", "review"], name


def test_clipping_is_off_for_no_clip_methods():
    unclipped = {name for name in METHODS if of(name).optimizer.clip_norm is None}
    assert unclipped == {"no-clip", "no-clip-r1", "vanilla-no-clip", "up-mopd"}
    assert of("vanilla-no-clip").method == of("vanilla").method and of("no-clip").method == Method()


def test_camopd_changes_no_field():
    assert dataclasses.asdict(of("camopd")) == dataclasses.asdict(BASE)


def test_a_config_is_recognised_as_its_method():
    """And only CaMOPD is called CaMOPD in a model card."""
    for name in METHODS:
        assert method_of(to_json(of(name))) == name
        assert ("CaMOPD (arXiv 2605.27115)" == description(of(name))) == (name == "camopd")
    other = changed(BASE, {"branches.recovery.objective": "reverse_kl"})
    assert method_of(to_json(other)) is None
    assert description(other) == (
        "on-policy distillation with the branches recovery (reverse_kl), review (sampled_token) in alternation"
    )
    assert method_of(to_json(changed(of("teacher-top-k"), {"rollout.top_p": 1.0}))) is None
    assert method_of(to_json(changed(of("minillm"), {"rollout.sampler": "student"}))) is None
    assert method_of(to_json(changed(of("minillm"), {"rollout.teacher_sampling.alpha": 0.3}))) is None
    assert method_of(to_json(changed(BASE, {"rollout.temperature": 0.9}))) == "camopd"
    earlier = to_json(BASE)
    for branch in earlier["branches"].values():
        del branch["weights"]
    del earlier["rollout"]["sampler"]
    assert method_of(earlier) == "camopd", "a field that an earlier version did not have"
    assert method_of({"method": {"schedule": "alternate"}, "optimizer": {}}) is None, "of an earlier version"
