"""Configs: defaults, checks, and errors that name the field."""

import dataclasses
import runpy
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import pytest
from etils import epath

from camopd_jax.config import SftConfig, TrainConfig, default
from camopd_jax.config.consistency import from_config_dict, warnings
from camopd_jax.config.identity import different_fields, fingerprint, from_json, to_json
from camopd_jax.config.methods import method_of
from camopd_jax.config.schema import BranchConfig, SelectionConfig, Stream
from camopd_jax.errors import UserError
from camopd_jax.runs.workdir import claim_workdir

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def minimal():
    config = default(TrainConfig)
    config.general_model, config.specialised_model = "general", "specialised"
    config.branches.recovery.prompts.source, config.branches.review.prompts.source = "g.jsonl", "d.jsonl"
    return config


def built(**changes):
    config = minimal()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return from_config_dict(TrainConfig, config)


def test_the_default_is_the_dataclass():
    assert built() == TrainConfig("general", "specialised", branches=built().branches)
    recovery, review = built().branches.values()
    assert recovery == BranchConfig(Stream("g.jsonl"), "general", scale=2.0, steps=3)
    assert review == BranchConfig(Stream("d.jsonl"), "specialised", selection=SelectionConfig("positive_gap"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_every_config_file_is_valid_and_names_its_command(file):
    module = runpy.run_path(str(file))
    config = module["get_config"]()
    cls = SftConfig if "model" in config else TrainConfig
    from_config_dict(cls, config)
    head = module["__doc__"]
    compared = file.stem.startswith("sandbox") or file.stem.endswith("study")
    command = "sft" if cls is SftConfig else "compare" if compared else "train"
    assert f"python -m camopd_jax.{command} --config=configs/{file.name}" in head


@pytest.mark.parametrize("name", ["medqa", "roleplay"])
def test_the_papers_configs_have_the_papers_values(name):
    (file,) = (f for f in CONFIGS if f.stem == name)
    config = from_config_dict(TrainConfig, runpy.run_path(str(file))["get_config"]())
    recovery, review = config.branches.values()
    assert (recovery.steps, review.steps) == (3, 1)
    assert (recovery.selection.mass, review.selection.mass) == (0.8, 0.8)
    assert (recovery.scale, review.scale) == (2.0, 1.0)
    assert (config.steps, config.rollout.batch_size, config.optimizer.learning_rate) == (120, 512, 2e-6)


@pytest.mark.parametrize("name", ["quickstart", "recover"])
def test_the_recipes_configs_have_its_settings(name):
    get_config = runpy.run_path(str(CONFIGS[0].with_stem(name)))["get_config"]
    assert method_of(to_json(from_config_dict(TrainConfig, get_config()))) == "recover"
    if name == "quickstart":
        assert method_of(to_json(from_config_dict(TrainConfig, get_config("camopd")))) == "camopd"
        with pytest.raises(ValueError, match="vanilla is no method of this file; give recover or camopd"):
            get_config("vanilla")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, r"config\.steps is 0; give a number > 0"),
        (
            {"rollout__batch_size": 12},
            r"config\.optimizer\.micro_batch is 8; give a divisor of rollout\.batch_size = 12",
        ),
        (
            {"rollout__batch_size": 6, "rollout__answers_per_prompt": 2, "optimizer__micro_batch": 8},
            r"config\.optimizer\.micro_batch is 8; give a divisor of rollout\.batch_size x "
            r"rollout\.answers_per_prompt = 12",
        ),
        (
            {"rollout__answers_per_prompt": 2, "rollout__temperature": 0.0},
            r"config\.rollout\.answers_per_prompt is 2; greedy answers to a prompt are all the same; give 1",
        ),
        (
            {"rollout__exploration": (1.5, 0.9)},
            r"config\.rollout\.exploration is \(1\.5, 0\.9\); it is of further answers to a prompt; give None, or",
        ),
        (
            {"rollout__answers_per_prompt": 2, "rollout__exploration": (0.0, 0.9)},
            r"config\.rollout\.exploration is \(0\.0, 0\.9\); give \(temperature, top-p\) with temperature > 0",
        ),
        (
            {"branches": {"recovery": {"selection": {"keep": "density"}}}},
            r"config\.branches\.recovery\.selection\.keep is 'density'; it compares answers to one prompt; give mass",
        ),
        (
            {"rollout__answers_per_prompt": 4, "rollout__concurrency": 6},
            r"config\.rollout\.concurrency is 6; give a multiple of rollout\.answers_per_prompt = 4",
        ),
        (
            {"rollout__answers_per_prompt": 3, "diagnostics__every": 5},
            r"config\.diagnostics\.rows is 64; give a multiple of rollout\.answers_per_prompt = 3",
        ),
        ({"rollout__score_batch": 7}, r"config\.rollout\.score_batch is 7; give a divisor of rollout\.batch_size = 64"),
        (
            {"branches__recovery__selection__mass": 0.0},
            r"config\.branches\.recovery\.selection\.mass is 0\.0; give a number > 0 and <= 1",
        ),
        ({"branches__recovery__steps": 0, "branches__review__steps": 0}, r"at least one of them needs steps > 0"),
        ({"branches__review__scale": -2.0}, r"config\.branches\.review\.scale is -2\.0; give a number > 0"),
        ({"branches__review__scale": float("inf")}, r"config\.branches\.review\.scale is inf; give a finite number"),
        ({"branches__recovery__prompts__limit": -5}, r"prompts\.limit is -5; give a number > 0 \(None: all\)"),
        ({"rollout__top_p": 1.5}, r"config\.rollout\.top_p is 1\.5; give a number > 0 and <= 1 \(1: off\)"),
        ({"rollout__temperature": -1.0}, r"config\.rollout\.temperature is -1\.0; give a number >= 0 \(0: greedy\)"),
        ({"rollout__temperature": float("inf")}, r"config\.rollout\.temperature is inf; give a finite number"),
        ({"optimizer__b1": 1.0}, r"config\.optimizer\.b1 is 1\.0; give a number >= 0 and < 1"),
        ({"optimizer__learning_rate": float("nan")}, r"config\.optimizer\.learning_rate is nan; give a finite number"),
        ({"optimizer__eps": -1.0}, r"config\.optimizer\.eps is -1\.0"),
        ({"optimizer__weight_decay": -3.0}, r"config\.optimizer\.weight_decay is -3\.0"),
        (
            {"optimizer__clip_norm": -1.0},
            r"config\.optimizer\.clip_norm is -1\.0; give a number > 0 \(None: no clipping\)",
        ),
        ({"optimizer__trained": "("}, r"config\.optimizer\.trained is '\(', not a regular expression"),
        ({"checkpoints__keep_best": -1}, r"config\.checkpoints\.keep_best is -1"),
        ({"log__samples": -1}, r"config\.log\.samples is -1"),
        ({"seed": -1}, r"config\.seed is -1; give a number >= 0 and < 2147483648"),
        ({"seed": 99999999999999999999}, r"config\.seed is 99999999999999999999"),
        (
            {"optimizer__schedule": "linear"},
            r"config\.optimizer\.schedule is 'linear'; it must be one of 'constant', 'cosine'",
        ),
        ({"method__importance_gate": (1.5, 2.0)}, r"config\.method\.importance_gate"),
        (
            {"method__advantage_clip": 0.0},
            r"\.advantage_clip is 0\.0; give a number > 0 \(None: no clip\)",
        ),
        (
            {"branches__recovery__prompts__source": ""},
            r"\.recovery\.prompts\.source is ''; name a file",
        ),
        ({"compute__remat": "all"}, r"config\.compute\.remat"),
        (
            {"compute__remat": "rollout", "rollout__concurrency": 8},
            r"config\.rollout\.concurrency is 8; give 0, or a compute",
        ),
        (
            {"compute__remat": "rollout", "method__answers": "teacher"},
            r"config\.compute\.remat is 'rollout'; it needs rollouts of the student.* give block",
        ),
    ],
)
def test_invalid_values_are_errors_that_name_the_field(changes, message):
    with pytest.raises(UserError, match=message):
        built(**changes)


def test_unknown_missing_and_wrongly_typed_fields():
    config = minimal()
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with pytest.raises(
        UserError, match=r"config\.optimizer\.learning_rat is not a field; did you mean learning_rate\?"
    ):
        from_config_dict(TrainConfig, config)
    with pytest.raises(UserError, match=r"config\.general_model is missing; set it"):
        from_config_dict(TrainConfig, default(TrainConfig))
    values = minimal().to_dict() | {"steps": "many"}
    with pytest.raises(UserError, match=r"config\.steps is 'many'; it must be of type int"):
        from_config_dict(TrainConfig, ml_collections.ConfigDict(values))
    values = minimal().to_dict() | {"method": 3}
    with pytest.raises(UserError, match=r"config\.method must be a block with the fields schedule"):
        from_config_dict(TrainConfig, ml_collections.ConfigDict(values))


def test_benchmarks_need_different_names():
    with pytest.raises(UserError, match="its own name"):
        config = minimal()
        config.evaluation.benchmarks = ({"name": "a", "source": "x.jsonl"}, {"name": "a", "source": "y.jsonl"})
        from_config_dict(TrainConfig, config)


def test_numbers_and_lists_are_converted():
    config = built(method__importance_gate=(0, 2), method__advantage_clip=5.0)
    assert config.method.importance_gate == (0.0, 2.0) and isinstance(config.method.importance_gate[0], float)
    assert config.method.advantage_clip == 5.0


def test_a_resolved_config_is_read_from_its_file(tmp_path):
    config = built(method__importance_gate=(0.5, 2.0), steps=7)
    claim_workdir(epath.Path(tmp_path), config)
    assert from_json(epath.Path(tmp_path) / "config.json") == config
    with pytest.raises(UserError, match=r"no such file; give the --workdir of a run"):
        from_json(epath.Path(tmp_path) / "none.json")


def test_the_fingerprint_depends_on_fields_that_affect_results():
    base = built()
    assert fingerprint(base) == fingerprint(dataclasses.replace(base, steps=999, max_skipped=1))
    assert fingerprint(base) != fingerprint(dataclasses.replace(base, seed=1))
    smaller = dict(optimizer__micro_batch=4, compute__remat="none", compute__offload="late", compute__logits_chunk=64)
    assert fingerprint(base) == fingerprint(built(**smaller, rollout__score_batch=2, rollout__concurrency=8))
    assert fingerprint(base) != fingerprint(built(rollout__batch_size=32))
    assert fingerprint(base) != fingerprint(built(optimizer__clip_norm=None))
    cosine = built(optimizer__schedule="cosine")
    assert fingerprint(cosine) != fingerprint(dataclasses.replace(cosine, steps=999))


def test_steps_below_the_resolution_of_the_weights_are_told():
    assert warnings(built(optimizer__learning_rate=1e-9)) == []
    assert warnings(built(compute__params="bfloat16", optimizer__learning_rate=1e-4)) == []
    (text,) = warnings(built(compute__params="bfloat16", optimizer__learning_rate=2e-6))
    assert "change only weights below 0.001," in text
    for weight, moves in ((0.0009, True), (0.0021, False)):  # bfloat16 itself
        w = jnp.bfloat16(weight)
        assert (jnp.bfloat16(jnp.float32(w) - 2e-6) != w) == moves


def test_different_fields_are_named():
    other = built(optimizer__learning_rate=1.0, steps=1, branches__recovery__scale=3.0)
    assert different_fields(to_json(built()), to_json(other)) == [
        "config.branches.recovery.scale", "config.optimizer.learning_rate"]  # fmt: skip


def test_a_mixed_batch_must_be_divisible():
    assert built(method__schedule="mixed", rollout__batch_size=64).method.schedule == "mixed"
    for changes, message in (
        ({"rollout__batch_size": 8, "branches__recovery__steps": 2}, "give a multiple of 3"),
        ({"branches__review__steps": 0}, r"every branch needs a share .* branches\.review\.steps > 0"),
        ({"method__moments": "separate"}, 'give "shared"'),
        (
            {"branches__recovery__clip_norm": 2.0},
            r"branches\.recovery\.clip_norm is 2\.0; a mixed step has one gradient",
        ),
        ({"branches__recovery__project_against": "review"}, r"project_against is 'review'; a mixed step"),
    ):
        with pytest.raises(UserError, match=message):
            built(method__schedule="mixed", **changes)
    with pytest.raises(UserError, match="it combines gradients of a mixed step"):
        built(method__conflict="pcgrad")
    with pytest.raises(UserError, match="balance is 'gap_spread'; it compares the branches of a mixed step"):
        built(method__balance="gap_spread")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"branches__recovery__project_against": "law"}, "is 'law'; name another branch with steps > 0, of review"),
        ({"branches__recovery__project_against": "recovery"}, "name another branch with steps > 0, of review"),
        (
            {"branches__recovery__project_against": "review", "branches__review__steps": 0},
            "is 'review'; no other branch has steps > 0",
        ),
        ({"branches__review__clip_norm": 0.0}, r"clip_norm is 0\.0; give a number > 0 \(None: config\.optimizer"),
    ],
)
def test_settings_of_a_branchs_update(changes, message):
    assert built(branches__recovery__project_against="review").branches["recovery"].project_against == "review"
    with pytest.raises(UserError, match=rf"config\.branches\.\w+\.\w+ .*{message}|{message}"):
        built(**changes)


def test_a_third_branch():
    config = minimal()
    config.branches.law = {"teacher": "models/law", "prompts": {"source": "law.jsonl"}}
    made = from_config_dict(TrainConfig, config)
    assert list(made.branches) == ["recovery", "review", "law"]
    assert made.branches["law"] == BranchConfig(Stream("law.jsonl"), "models/law")
    del config.branches.review
    assert list(from_config_dict(TrainConfig, config).branches) == ["recovery", "law"]
    config.branches.mixed = {"prompts": {"source": "m.jsonl"}}
    with pytest.raises(UserError, match=r"config\.branches is 'mixed'; name it with letters"):
        from_config_dict(TrainConfig, config)


def test_the_fingerprint_depends_on_the_order_of_branches():
    forth, back = built(), built()
    back = dataclasses.replace(back, branches=dict(reversed(back.branches.items())))
    assert fingerprint(forth) != fingerprint(back)
    assert different_fields(to_json(forth), to_json(back)) == ["config.branch_order"]
    assert list(default(TrainConfig).branches) == ["recovery", "review"]


@pytest.mark.parametrize(
    "old, new",
    [
        (
            {"general": {"source": "x"}},
            r"config\.general is not a field any more; it is now config\.branches\.recovery",
        ),
        ({"domain": {"source": "x"}}, r"config\.domain .* config\.branches\.review\.prompts"),
        ({"method": {"recovery": {"mass": 1.0}}}, r"config\.method\.recovery .* selection\.mass"),
        ({"method": {"review_steps": 1}}, r"config\.method\.review_steps .* config\.branches\.review\.steps"),
        ({"method": {"domain_teacher": "general"}}, r"config\.method\.domain_teacher .*branches\.review\.teacher"),
        ({"rollout": {"places": 8}}, r"config\.rollout\.places .* config\.rollout\.concurrency"),
        ({"log": {"tensorboard": False}}, r"config\.log\.tensorboard .* config\.log\.trackers"),
    ],
)
def test_old_field_names_are_errors_with_the_new_name(old, new):
    values = minimal().to_dict()
    for name, value in old.items():
        values[name] = values.get(name, {}) | value
    with pytest.raises(UserError, match=new):
        from_config_dict(TrainConfig, ml_collections.ConfigDict(values))
