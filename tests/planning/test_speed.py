"""The time of a run by arithmetic."""

import math
import runpy
from pathlib import Path

import jax
import pytest

from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.identity import changed
from camopd_jax.config.schema import TrainConfig
from camopd_jax.method.branches import find_models
from camopd_jax.method.setup import resolve
from camopd_jax.planning.arrays import read_folders
from camopd_jax.planning.costs import forward_flops, step_seconds
from camopd_jax.planning.speed import measured_chip, run_seconds
from camopd_jax.planning.topology import Chip

ROOT = Path(__file__).parents[2]
FAST = Chip("a", 0.0, 1e9, math.inf, math.inf, 1, 1)  # products alone take time


@pytest.fixture(scope="module")
def config():
    return from_config_dict(TrainConfig, runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_config"]("camopd"))


def seconds(config, questions, chip=FAST, **fields):
    setup = resolve(changed(config, fields), jax.devices()[:1])
    models = read_folders(config, find_models(config), setup.context)
    return setup, models, run_seconds(setup, models, chip, questions)


def test_steps_and_evaluations(config):
    """96 questions, answered by both teachers and the student; 60 of them again after each 50 of 240 steps."""
    fields = {"evaluation.every": 50, "evaluation.questions": 60, "evaluation.batch_size": 96}
    setup, models, found = seconds(config, {"covered": 96}, **fields)
    assert found["steps"] == pytest.approx(240 * step_seconds(setup, models, 32, FAST))
    flops = forward_flops(models.student, 96, 0, 64, 0) + forward_flops(models.student, 96, 64, 96, 32)
    assert found["evaluations"] == pytest.approx((3 + 4 * 60 / 96) * flops / 1e9)
    assert found["answers before"] == 0


def test_what_teachers_write_before(config):
    """64 answers of recovery's teacher for the warm-up, and 128 prompts that it writes."""
    _, models, found = seconds(config, {}, **{"warm_up.steps": 4, "warm_up.prompts": 64})
    flops = forward_flops(models.student, 64, 0, 64, 0) + forward_flops(models.student, 64, 64, 96, 32)
    assert found["answers before"] == pytest.approx(2 * flops / 1e9), "of both branches"
    *_, found = seconds(
        config, {}, **{"branches.recovery.prompts.source": "self", "branches.recovery.prompts.writing.rows": 128}
    )
    flops = forward_flops(models.student, 64, 0, 1, 0) + forward_flops(models.student, 64, 1, 65, 64)
    assert found["answers before"] == pytest.approx(2 * flops / 1e9)
    assert found["evaluations"] == 0


def test_the_speed_of_this_device():
    chip = measured_chip("float32", "cpu")
    assert 1e8 < chip.flops < 1e14 and 1e8 < chip.hbm_bandwidth < 1e13
    assert measured_chip("float32", "cpu") is chip, "measured once"
