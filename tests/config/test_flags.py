"""Fields of a config on the command line and in YAML: every one, set in the config file or not, and None."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from camopd_jax.config import TrainConfig, default
from camopd_jax.config.consistency import from_config_dict
from camopd_jax.errors import UserError
from camopd_jax.runtime import cli

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
        "start.interpolation=auto",
        "evaluation.answers=~/kept",
    )
    config = json.loads(ended.stdout)
    prompts = {name: branch["prompts"] for name, branch in config["branches"].items()}
    assert prompts["recovery"]["teacher_template"] == {"system": "Be kind: (now)", "options": {}}
    assert prompts["recovery"]["template"] == {"system": None, "options": {"enable_thinking": False}}
    assert prompts["review"]["teacher_template"] == {"system": "given", "options": {"level": 2}}
    assert prompts["law"]["template"]["system"] == "42"
    assert [one["limit"] for one in prompts.values()] == [10, None, 7]
    assert config["branches"]["law"]["selection"]["keep"] == "random" and config["branches"]["law"]["scale"] == 3.0
    assert config["start"]["interpolation"] == "auto"
    assert config["evaluation"]["answers"] == str(Path.home() / "kept")
    assert config["optimizer"]["clip_norm"] is None and config["evaluation"]["questions"] is None
    assert config["method"]["advantage_clip"] == 5.0 and config["method"]["importance_gate"] == [0.0, 2.0]


@pytest.mark.parametrize(
    "setting, says",
    [
        ("optimizer.clip_nrm=1", "--config.optimizer.clip_nrm is not a field of the config; did you mean clip_norm?"),
        ("branches.recovry.steps=1", "--config.branches.recovry.steps is not a field of the config"),
        ("branches.recovery.prompts.teacher_template.sys=1", "teacher_template.sys is not a field of the config"),
        ("optimizer.learning_rate=None", "--config.optimizer.learning_rate=None: could not convert"),
        (
            "start.interpolation=1.5",
            "config.start.interpolation is 1.5; give a number >= 0 and <= 1 (0: the special",
        ),
        ("start.interpolation=nearly", "is 'nearly'; it must be of type float or 'auto'"),
        ("evaluation.benchmarks.0.limit=3", "is not the name of a field, which has letters, digits and _ between dots"),
        ("optimizer.clip_norm=much", "--config.optimizer.clip_norm=much: could not convert"),
    ],
)
def test_names_and_values_that_cannot_be(run, setting, says):
    ended = run(setting)
    assert ended.returncode == 2 and says in ended.stderr and len(ended.stderr.splitlines()) == 1, ended.stderr


def test_two_config_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config=a.yaml", "--config=b.yaml", "--config.steps=1"])
    with pytest.raises(UserError, match="--config is given twice; give one config file"):
        cli._ConfigParser((TrainConfig,)).parse("b.yaml")


YAML = """
general_model: m
specialised_model: &student m
steps: 7
branches:
  recovery:
    prompts: {source: x.jsonl, template: {system: Be kind, options: {enable_thinking: off, level: 2}}}
    objective: jsd(beta=0.1)
  review:
    prompts:
      source: x.jsonl
      limit:
  law: {teacher: law, prompts: {source: law.jsonl}, steps: 2}
optimizer: {learning_rate: 1e-6, clip_norm: null, weight_decay: 1}
compute: {offload: off}
method: {importance_gate: [0, 2]}
evaluation:
  benchmarks:
    - {name: mine, task: exact, source: y.jsonl, temperature: 1}
"""


@pytest.fixture
def run_yaml(tmp_path):
    """run_yaml(TEXT, NAME=VALUE, ...) -> the ended command."""

    def of(text, *settings):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        flags = [f"--config={file}", *(f"--config.{setting}" for setting in settings)]
        return subprocess.run([sys.executable, "-c", COMMAND, *flags], capture_output=True, text=True)

    return of


def test_a_yaml_file_is_the_config_of_the_same_fields(run_yaml):
    """Blocks keep their other defaults, 1e-6 is a number and off a text, as in YAML 1.2."""
    ended = run_yaml(YAML, "optimizer.warmup_steps=3", "optimizer.weight_decay=0.5", "branches.law.scale=2.5")
    assert ended.returncode == 0, ended.stderr
    expected = default(TrainConfig)
    expected.general_model = expected.specialised_model = "m"
    expected.steps = 7
    recovery, review = expected.branches.recovery, expected.branches.review
    recovery.prompts.source = review.prompts.source = "x.jsonl"
    recovery.prompts.template.system = "Be kind"
    recovery.prompts.template.options = dict(enable_thinking="off", level=2)
    recovery.objective = "jsd(beta=0.1)"
    expected.branches.law = dict(teacher="law", prompts=dict(source="law.jsonl"), steps=2, scale=2.5)
    expected.optimizer.update(learning_rate=1e-6, clip_norm=None, weight_decay=0.5, warmup_steps=3)
    expected.method.importance_gate = (0, 2)
    expected.evaluation.benchmarks = (dict(name="mine", task="exact", source="y.jsonl", temperature=1.0),)
    config = dataclasses.asdict(from_config_dict(TrainConfig, expected))
    assert json.loads(ended.stdout) == json.loads(json.dumps(config))


@pytest.mark.parametrize(
    "text, says",
    [
        (YAML.replace("steps: 7", "step: 7"), "config.step is not a field; did you mean steps?"),
        (YAML.replace("steps: 7", "steps: seven"), "config.steps is 'seven'; it must be of type int"),
        (YAML.replace("steps: 7", "steps: {n: 7}"), "config.steps is {'n': 7}; it must be of type int"),
        (YAML.replace("1e-6", "-1"), "config.optimizer.learning_rate is -1.0; give a number >= 0"),
        (YAML.replace("compute: {offload: off}", "compute: late"), "config.compute must be a block with the fields"),
        (YAML.replace("steps: 7", "steps: [7"), "mine.yaml:5: not YAML (expected"),
        ("- 1\n- 2\n", "mine.yaml: give the fields of a config as `name: value`"),
        ("steps: !!python/object/apply:os.getcwd []\n", "mine.yaml:1: not YAML"),
        ("steps: 7\n", "config.general_model is missing"),
    ],
)
def test_mistakes_in_a_yaml_file(run_yaml, text, says):
    ended = run_yaml(text)
    assert ended.returncode == 2 and says in ended.stderr and len(ended.stderr.splitlines()) == 1, ended.stderr
