"""Every control is a config that can be, and a method of its own."""

import dataclasses

import pytest

from camopd_jax.config.identity import changed, to_json
from camopd_jax.config.methods import CONTROLS, QUICK
from camopd_jax.config.schema import Method, Optimizer, RolloutConfig, Stream, TrainConfig
from camopd_jax.method import loop

BASE = TrainConfig("g", "s", Stream("g"), Stream("d"), rollout=RolloutConfig(batch_size=64),
                   optimizer=Optimizer(micro_batch=8))  # fmt: skip


def of(name):
    return changed(BASE, CONTROLS[name].changes)


def test_each_control_is_another_run_of_the_same_budget():
    made = {name: of(name) for name in CONTROLS}
    assert made["camopd"] == BASE and BASE.method == Method()
    assert len({str(to_json(config)) for config in made.values()}) == len(CONTROLS)
    for config in made.values():
        assert (config.steps, config.rollout, config.seed) == (BASE.steps, BASE.rollout, BASE.seed)
        rows = loop.batch_rows(config)
        acting = loop.ACTING[loop.phase_at(0, config.method)]
        assert sum(rows[name] for name in acting) == 64
    assert set(QUICK) < set(CONTROLS)


@pytest.mark.parametrize(
    "name, wanted",
    [
        (
            "vanilla",
            {"schedule": "mixed", "recovery_steps": 1, "recovery.mass": 1, "review.mass": 1, "recovery.scale": 1},
        ),
        ("mixed-3-1", {"schedule": "mixed", "recovery_steps": 3, "recovery.mass": 1, "recovery.scale": 1}),
        ("alternating", {"schedule": "alternate", "recovery.mass": 1, "review.mass": 1, "recovery.scale": 2}),
        ("alternating-r1", {"schedule": "alternate", "recovery.mass": 1, "recovery.scale": 1}),
        ("selection", {"schedule": "mixed", "recovery.mass": 0.8, "review.mass": 0.8, "recovery.scale": 1}),
        ("pull-2", {"schedule": "mixed", "recovery.mass": 1, "recovery.scale": 2}),
        ("camopd-1-1", {"recovery_steps": 1, "review_steps": 1, "recovery.mass": 0.8}),
        ("camopd-5-1", {"recovery_steps": 5, "review_steps": 1}),
        ("mass-0.6", {"recovery.mass": 0.6, "review.mass": 0.6}),
        ("half", {"recovery.keep": "fraction", "review.keep": "fraction", "recovery.mass": 0.5}),
        ("random", {"recovery.keep": "random", "review.keep": "random", "recovery.mass": 0.8}),
        ("scores-swapped", {"recovery.score": "positive_gap", "review.score": "absolute_gap"}),
        ("moments", {"moments": "separate"}),
        ("pcgrad", {"schedule": "mixed", "conflict": "pcgrad", "recovery.mass": 1}),
        ("recovery-only", {"review_steps": 0}),
        ("review-only", {"recovery_steps": 0}),
        ("one-teacher", {"domain_teacher": "general", "schedule": "mixed"}),
        ("distillation", {"answers": "teacher", "review_steps": 0, "recovery.scale": 1}),
        ("replay-12", {"answers": "teacher", "schedule": "mixed", "recovery_steps": 1, "review_steps": 7}),
    ],
)
def test_a_control_is_what_its_name_says(name, wanted):
    method = of(name).method
    for field, value in wanted.items():
        node = method
        for part in field.split("."):
            node = getattr(node, part)
        assert node == value, field


def test_clipping_is_off_where_the_name_says_so():
    unclipped = {name for name in CONTROLS if of(name).optimizer.clip_norm is None}
    assert unclipped == {"no-clip", "no-clip-r1", "vanilla-no-clip"}
    assert of("vanilla-no-clip").method == of("vanilla").method and of("no-clip").method == Method()


def test_the_paper_s_setting_is_left_as_it_is():
    assert dataclasses.asdict(of("camopd")) == dataclasses.asdict(BASE)
