"""Fields of a config on the command line: every one, set in the config file or not, and None where it may be."""

import json
import subprocess
import sys

import pytest

CONFIG = """
from camopd_jax.config import TrainConfig, default

def get_config():
    config = default(TrainConfig)
    config.general_model = config.specialised_model = "m"
    config.branches.recovery.prompts.source = config.branches.review.prompts.source = "x.jsonl"
    config.branches.review.prompts.teacher_template = dict(system="given")
    config.branches.law = dict(teacher="law", prompts=dict(source="law.jsonl", limit=None))
    config.evaluation.questions = 64
    return config
"""
COMMAND = """
import dataclasses, json
from camopd_jax.config import TrainConfig
from camopd_jax.runtime import cli

read = cli.config_flag(TrainConfig)
cli.run(lambda: print(json.dumps(dataclasses.asdict(read()))))
"""


@pytest.fixture
def run(tmp_path):
    """run(NAME=VALUE, ...) -> the ended command, whose output is the config as JSON."""
    (tmp_path / "config.py").write_text(CONFIG)

    def of(*settings):
        flags = [f"--config={tmp_path / 'config.py'}", *(f"--config.{setting}" for setting in settings)]
        return subprocess.run([sys.executable, "-c", COMMAND, *flags], capture_output=True, text=True)

    return of


def test_fields_of_blocks_that_the_config_leaves_out_and_none(run):
    recovery, review, law = "branches.recovery.prompts", "branches.review.prompts", "branches.law"
    ended = run(
        f"{recovery}.teacher_template.system=Be kind: (now)",
        f"{recovery}.template.options.enable_thinking=False",
        f"{recovery}.limit=10",
        f"{review}.teacher_template.options.level=2",
        f"{law}.prompts.limit=7",
        f"{law}.prompts.template.system=42",
        f"{law}.selection.keep=random",
        f"{law}.scale=3",
        "optimizer.clip_norm=None",
        "method.advantage_clip=5",
        "method.importance_gate=(0, 2)",
        "evaluation.questions=None",
    )
    config = json.loads(ended.stdout)
    prompts = {name: branch["prompts"] for name, branch in config["branches"].items()}
    assert prompts["recovery"]["teacher_template"] == {"system": "Be kind: (now)", "options": {}}
    assert prompts["recovery"]["template"] == {"system": None, "options": {"enable_thinking": False}}
    assert prompts["review"]["teacher_template"] == {"system": "given", "options": {"level": 2}}
    assert prompts["law"]["template"]["system"] == "42"
    assert [one["limit"] for one in prompts.values()] == [10, None, 7]
    assert config["branches"]["law"]["selection"]["keep"] == "random" and config["branches"]["law"]["scale"] == 3.0
    assert config["optimizer"]["clip_norm"] is None and config["evaluation"]["questions"] is None
    assert config["method"]["advantage_clip"] == 5.0 and config["method"]["importance_gate"] == [0.0, 2.0]


@pytest.mark.parametrize(
    "setting, says",
    [
        ("optimizer.clip_nrm=1", "--config.optimizer.clip_nrm is not a field of the config; did you mean clip_norm?"),
        ("branches.recovry.steps=1", "--config.branches.recovry.steps is not a field of the config"),
        ("branches.recovery.prompts.teacher_template.sys=1", "teacher_template.sys is not a field of the config"),
        ("optimizer.learning_rate=None", "--config.optimizer.learning_rate=None: could not convert"),
        ("optimizer.clip_norm=much", "--config.optimizer.clip_norm=much: could not convert"),
    ],
)
def test_names_and_values_that_cannot_be(run, setting, says):
    ended = run(setting)
    assert ended.returncode == 2 and says in ended.stderr and len(ended.stderr.splitlines()) == 1, ended.stderr
