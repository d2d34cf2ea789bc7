"""Values for fields that are "auto": the choice by memory, and that it is all that "auto" changes."""

import dataclasses
import json

import jax
import pytest
from quickstart import SMALL
from rows import read_lines

from camopd_jax.config.schema import (
    Adapter,
    BranchConfig,
    MeshConfig,
    RolloutConfig,
    SelectionConfig,
    Stream,
    TrainConfig,
)
from camopd_jax.errors import UserError
from camopd_jax.method.setup import resolve
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import automatic, costs
from camopd_jax.planning.arrays import make_models, plan
from camopd_jax.planning.automatic import MARGIN, choose
from camopd_jax.planning.compiling import compile_program
from camopd_jax.planning.programs import programs
from camopd_jax.planning.search import changed
from camopd_jax.runs.grid import compare

GIB = 2**30
AUTO = {"compute.remat": "auto", "optimizer.micro_batch": "auto"}


def configured(mass=1.0, **changes):
    """64 answers of up to 640 slots with the prompt."""
    branches = {
        "recovery": BranchConfig(prompts=Stream("g"), teacher="general", selection=SelectionConfig(mass=mass)),
        "review": BranchConfig(prompts=Stream("d"), teacher="specialised", selection=SelectionConfig(mass=mass)),
    }
    rollout = RolloutConfig(batch_size=64, max_prompt_tokens=128, max_response_tokens=512)
    return changed(TrainConfig("g", "s", branches, rollout=rollout), AUTO | changes)


def models_of(config, shape="qwen3-1.7b", **fields):
    values = SHAPES[shape] | fields
    one = from_hf(values, context=640)
    return make_models(config, {"general": one, "specialised": one}, {})


def chosen(config, limit=80 * GIB, before=None, devices=1):
    made = choose(config, models_of(config), jax.devices()[:devices], limit, before)
    assert not {"auto"} & {made.config.compute.remat, made.config.optimizer.micro_batch}
    return made.config.compute.remat, made.config.optimizer.micro_batch


@pytest.fixture
def gpu(monkeypatch):
    """The rules for accelerators, on CPU devices."""
    monkeypatch.setattr(automatic, "platform", lambda mesh: "gpu")


BFLOAT16 = {"compute.matmul": "bfloat16"}


def test_on_a_cpu_the_residual_stream_is_kept_where_the_sampler_is_trusted():
    assert chosen(configured(), 1000 * GIB) == ("rollout", 8)
    assert chosen(configured(**BFLOAT16), 1000 * GIB) == ("block", 8), "in bfloat16 the sampler is not trusted"
    assert chosen(configured(**{"rollout.concurrency": 8}), 1000 * GIB) == ("block", 8)
    eight = configured(**{"mesh": MeshConfig(fsdp=8, data=1)})
    assert chosen(eight, 1000 * GIB, devices=8) == ("rollout", 64), "eight rows a device"


def test_only_what_is_auto_is_chosen():
    assert chosen(configured(**{"compute.remat": "dots"}), 1000 * GIB) == ("dots", 8)
    assert chosen(configured(**{"optimizer.micro_batch": 32}), 1000 * GIB) == ("rollout", 32)
    config = configured(**{"compute.remat": "none", "optimizer.micro_batch": 2})
    made = choose(config, models_of(config), jax.devices()[:1], GIB)
    assert made.config == config and made.values == {}


def test_the_measured_order_on_an_h200():
    """Gradients of Qwen3-1.7B's shape, every answer trained: seconds of docs/performance_record.md."""
    setup = resolve(configured(**{"compute.remat": "block", "optimizer.micro_batch": 8} | BFLOAT16), jax.devices()[:1])
    measured = {("block", 8): 1.39, ("dots", 8): 1.27, ("block", 16): 1.29, ("dots", 16): 1.16}
    ours = {one: automatic.relative_seconds(setup, *one) for one in measured}
    for one, seconds in measured.items():
        assert ours[one] / ours["dots", 16] == pytest.approx(seconds / 1.16, rel=0.03)


def test_less_memory_gives_smaller_micro_batches_and_more_recomputation(gpu):
    """Every choice is the quickest of those that fit, found here by trying all."""
    config, devices = configured(**BFLOAT16), jax.devices()[:1]
    models = models_of(config)
    options = {}
    for remat in ("dots", "block"):
        for rows in (1, 2, 4, 8, 16, 32, 64):
            setup = resolve(changed(config, {"compute.remat": remat, "optimizer.micro_batch": rows}), devices)
            needs = max(costs.memory_estimate(setup, models).values())
            options[remat, rows] = needs, automatic.relative_seconds(setup, remat, rows)
    picks = {}
    for gib in (45, 46, 50, 60, 80, 140):
        fitting = [one for one, (needs, _) in options.items() if needs <= MARGIN * gib * GIB]
        picks[gib] = chosen(config, gib * GIB)
        assert picks[gib] == min(fitting, key=lambda one: options[one][1]), gib
    assert len(set(picks.values())) == 6
    assert picks[140] == ("dots", 64), "every answer is trained, so no row is wasted"
    assert chosen(configured(mass=0.5, **BFLOAT16), 1000 * GIB) == ("dots", 16), "rows of a last micro-batch are"
    least = min(options, key=lambda one: options[one][0])
    made = choose(config, models, devices, 20 * GIB)
    assert (made.config.compute.remat, made.config.optimizer.micro_batch) == least == ("block", 1)
    assert str(made).endswith("of 20 GiB by the plan, which is too much by the plan") and made.needs > 20 * GIB


def test_the_margin_is_part_of_the_choice(gpu):
    config = configured(**BFLOAT16)
    made = choose(config, models_of(config), jax.devices()[:1], 60 * GIB)
    exact = made.needs / MARGIN
    one = made.config.compute.remat, made.config.optimizer.micro_batch
    assert chosen(config, exact * (1 + 1e-9)) == one != chosen(config, exact * (1 - 1e-9))


def test_a_resumed_run_keeps_its_values_where_they_fit(gpu):
    config = configured(**BFLOAT16)
    before = {"compute.remat": "block", "optimizer.micro_batch": 4}
    assert chosen(config, 140 * GIB, before) == ("block", 4)
    large = {"compute.remat": "dots", "optimizer.micro_batch": 64}
    assert chosen(config, 140 * GIB, large) == ("dots", 64) != chosen(config, 50 * GIB, large)
    assert chosen(config, 140 * GIB, before | {"optimizer.micro_batch": 5}) == ("dots", 64), "no divisor of the batch"
    assert chosen(config, 140 * GIB, {}) == ("dots", 64)


def test_what_does_not_choose_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="config.compute.remat is 'auto', for which only train, .* such as block"):
        resolve(configured(**{"optimizer.micro_batch": 8}))
    with pytest.raises(UserError, match="config.optimizer.micro_batch is 'auto', for which only train, .* such as 8"):
        resolve(configured(**{"compute.remat": "block"}))
    base = changed(configured(), {"evaluation.benchmarks": ("one",)})
    with pytest.raises(UserError, match="'auto', which is chosen for one run"):
        compare(base, str(tmp_path / "grid"), ["camopd"], [1e-4], 1, 1)
    assert not (tmp_path / "grid").exists()


# ---------------------------------------------------------------------- against compilers and runs


@pytest.mark.slow
@pytest.mark.parametrize("remat, adapter, low", [("block", False, 0.9), ("dots", True, 0.9), ("rollout", False, 0.9)])
def test_the_estimate_of_a_gradient_is_near_the_compilers(remat, adapter, low):
    """Four layers of Qwen3-0.6B's shape in float32, on a CPU."""
    config = configured(**{"compute.remat": remat, "optimizer.micro_batch": 8, "rollout.batch_size": 32})
    if adapter:
        config = dataclasses.replace(config, adapter=Adapter())
    models = models_of(config, "qwen3-0.6b", num_hidden_layers=4, vocab_size=40_000)
    made = plan(config, models, jax.devices()[:1])
    (program,) = (one for one in programs(made) if one.name == "gradient: recovery")
    compiled = compile_program(program).memory["temporaries"]
    assert low < costs._gradient_memory(made.setup, models.student) / compiled < 1.8


@pytest.mark.slow
def test_a_run_with_auto_is_the_run_with_its_values(command, tmp_path):
    """Metrics and weights, its first line, what it records, and a resume in which other values would be chosen."""
    auto = [f"--config.{name}=auto" for name in AUTO]
    small = [*(flag for flag in SMALL if "micro_batch" not in flag), "--config.steps=2"]
    ended = command("train", f"--workdir={tmp_path / 'auto'}", *small, *auto)
    assert ended.code == 0, ended.err
    assert "\nremat rollout, micro-batch 8: " in ended.out
    record = json.loads((tmp_path / "auto/config.json").read_text())["config"]
    assert (record["compute"]["remat"], record["optimizer"]["micro_batch"]) == ("rollout", 8)
    named = ["--config.compute.remat=rollout", "--config.optimizer.micro_batch=8"]
    ended = command("train", f"--workdir={tmp_path / 'named'}", *small, *named)
    assert ended.code == 0, ended.err
    assert "by the plan" not in ended.out
    steps = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("auto", "named")]
    timed = ("seconds", "tokens_per_second", "memory_gib")
    first, second = ([{k: v for k, v in row.items() if k not in timed} for row in rows] for rows in steps)
    assert first == second
    files = [tmp_path / name / "export/model.safetensors" for name in ("auto", "named")]
    assert files[0].read_bytes() == files[1].read_bytes()
    changed = json.loads((tmp_path / "named/config.json").read_text())
    changed["config"]["optimizer"]["micro_batch"] = 4  # as if chosen on a smaller machine
    (tmp_path / "named/config.json").write_text(json.dumps(changed))
    again = command("train", f"--workdir={tmp_path / 'named'}", *small, *auto)
    assert again.code == 0 and "\nremat rollout, micro-batch 4: " in again.out
