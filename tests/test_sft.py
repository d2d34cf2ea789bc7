"""The command `sft`: it trains, resumes with identical bits, and exports."""

import shutil
import signal

import numpy as np
import pytest
from documented import documented_keys
from quickstart import QUICKSTART
from rows import chat_row, edit_json, read_lines, write_lines
from safetensors.numpy import load_file

CONFIG = f"""
from camopd_jax.config import SftConfig, default

def get_config():
    config = default(SftConfig)
    config.model = "{QUICKSTART / "generalist"}"
    config.data.source = "{QUICKSTART / "eval_domain.jsonl"}"
    config.answer = "Final answer: {{letter}}"
    config.steps = 6
    config.batch_size = 16
    config.max_tokens = 128
    config.smallest_bucket = 64
    config.optimizer.learning_rate = 1e-3
    config.checkpoints.every = 2
    config.evaluation.benchmarks = (dict(name="domain", source="{QUICKSTART / "eval_domain.jsonl"}", axis="domain",
                                         task="choice", limit=32, max_response_tokens=20),)
    return config
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("sft")
    (folder / "config.py").write_text(CONFIG)
    flags = [f"--config={folder / 'config.py'}"]
    ended = command("sft", f"--workdir={folder / 'run'}", *flags)
    assert ended.code == 0, ended.err
    return folder / "run", flags


def test_sft_learns_the_form_of_the_answers(whole):
    metrics, scores = read_lines(whole[0] / "metrics.jsonl"), read_lines(whole[0] / "eval.jsonl")
    assert {key for row in metrics for key in row} < documented_keys("metrics")
    assert {key for row in scores for key in row} == documented_keys("eval")
    assert [row["step"] for row in metrics] == list(range(6)) and {row["phase"] for row in metrics} == {"sft"}
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    before, after = ({r["model"]: r for r in scores}[name] for name in ("start", "student"))
    assert before["unmarked"] == 1 and (before["step"], after["step"]) == (0, 6)
    assert "supervised fine-tuning" in (whole[0] / "export" / "README.md").read_text()


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bits(whole, command, tmp_path):
    def reached():
        file = tmp_path / "run" / "metrics.jsonl"
        return file.exists() and len(file.read_text().splitlines()) >= 3

    ended = command.start("sft", f"--workdir={tmp_path / 'run'}", *whole[1]).when(reached, signal.SIGKILL)
    assert ended.code == -signal.SIGKILL
    assert command("sft", f"--workdir={tmp_path / 'run'}", *whole[1]).code == 0
    ours, theirs = (load_file(w / "export" / "model.safetensors") for w in (tmp_path / "run", whole[0]))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_field_that_the_rows_do_not_have(whole, command, tmp_path):
    ended = command("sft", f"--workdir={tmp_path / 'run'}", *whole[1], "--config.answer={nothing}")
    assert ended.code == 2 and "asks for the field 'nothing'" in ended.err


def test_what_is_odd_about_the_answers_is_told(whole, command, tmp_path):
    model = shutil.copytree(QUICKSTART / "generalist", tmp_path / "model")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('-')[-1] }}{% endfor %}"
    opens = "{% if add_generation_prompt %}<|assistant|>-{% endif %}"
    edit_json(model / "tokenizer_config.json", chat_template=template + opens)
    rows = write_lines(tmp_path / "rows.jsonl", [*[chat_row("a", "-b")] * 8, chat_row("a", "b")])
    ended = command(
        "sft", f"--workdir={tmp_path / 'run'}", *whole[1], f"--config.model={model}", f"--config.data.source={rows}",
        "--config.steps=1", "--config.batch_size=8", "--config.evaluation.benchmarks=()",
    )  # fmt: skip
    out = " ".join(ended.out.split())
    assert ended.code == 0, ended.err
    assert (
        "warning: the chat template writes no special token after an answer; the tokenizer's eos_token '<|end|>'" in out
    )
    assert f"warning: 1 rows are left out, the first is {rows}:9: the chat template opens every answer with '-'" in out
    assert "conversations: 8 used, 1 left out because no answer can be learnt" in out


def test_a_micro_batch_that_does_not_divide_the_batch(whole, command, tmp_path):
    ended = command("sft", f"--workdir={tmp_path / 'run'}", *whole[1], "--config.batch_size=12")
    assert ended.code == 2 and "config.optimizer.micro_batch is 8; give a divisor of batch_size = 12" in ended.err
