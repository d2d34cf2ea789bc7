"""Runs whose teacher writes the prompts: config.branches.BRANCH.prompts.source = "self"."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from builders import train_config
from etils import epath
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import read_lines

from camopd_jax.config.schema import RolloutConfig, Stream, Template, Writing
from camopd_jax.data import templates
from camopd_jax.data.templates import Reader
from camopd_jax.errors import UserError
from camopd_jax.inference.answer import Answer
from camopd_jax.models.checksums import sha256
from camopd_jax.runs import self_prompts, written_prompts

GENERALIST = QUICKSTART / "generalist"
CONFIG = train_config(
    recovery={"prompts": Stream("self", writing=Writing(rows=2))}, rollout=RolloutConfig(max_prompt_tokens=24)
)


def test_a_text_has_the_room_that_the_template_leaves():
    """The template of the quickstart's models is <|user|>text<|end|><|assistant|>."""
    reader = Reader(templates.load_tokenizer(GENERALIST), 999)
    assert written_prompts.longest_text(CONFIG, "recovery", reader) == 24 - 3
    small = replace(CONFIG, rollout=RolloutConfig(max_prompt_tokens=3))
    with pytest.raises(UserError, match="max_prompt_tokens = 3 leaves no room for a text beside the 3 tokens"):
        written_prompts.longest_text(small, "recovery", reader)


def test_the_settings_are_those_of_the_run():
    stream = Stream("self", template=Template(system="a"), teacher_template=Template(system="b"))
    config = train_config(recovery={"prompts": stream}, seed=7, rollout=RolloutConfig(batch_size=32))
    settings = written_prompts.settings_of(config, "recovery", 21)
    assert (settings.model, settings.system, settings.seed, settings.batch_size) == ("g", "b", 7, 32)
    files = written_prompts.with_files(config, "runs/one")
    assert files.branches["recovery"].prompts.source == "runs/one/self_prompts/recovery/prompts.jsonl"
    assert files.branches["review"] == config.branches["review"]


def test_texts_that_were_sampled_are_not_sampled_again(tmp_path):
    """The second half was lost: it alone is sampled again."""
    calls = []

    def sample(numbers, on_batch):
        calls.append(list(numbers))
        on_batch({number: Answer([number], [], f"text {number}", True, 0.5) for number in numbers})

    file = epath.Path(tmp_path / "8.jsonl")
    texts = self_prompts._kept(file, ["model"], range(8, 12), sample)
    assert [one.text for one in texts] == [f"text {number}" for number in range(8, 12)]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]) + '{"cut')
    assert self_prompts._kept(file, ["model"], range(8, 12), sample) == texts
    self_prompts._kept(file, ["another model"], range(8, 12), sample)
    assert calls == [[8, 9, 10, 11], [10, 11], [8, 9, 10, 11]]


def test_files_of_other_settings_or_with_changes_are_refused(tmp_path):
    settings = written_prompts.settings_of(CONFIG, "recovery", 21)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    part = {"source": "g", "asked": 2}
    manifest = self_prompts.facts(settings) | {
        "parts": [part],
        "files": {"prompts.jsonl": sha256(tmp_path / "prompts.jsonl")},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    written_prompts._check_written(tmp_path, settings)
    with pytest.raises(UserError, match="written with another seed, rows; remove it"):
        written_prompts._check_written(tmp_path, replace(settings, seed=1, rows=3))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "b"}\n')
    with pytest.raises(UserError, match="missing, or changed since it was written"):
        written_prompts._check_written(tmp_path, settings)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not the manifest"):
        written_prompts._check_written(tmp_path, settings)


WRITING = "--config.branches.recovery.prompts.writing"
WRITES = [
    PAPER_CONFIG,
    "--config.branches.recovery.prompts.source=self", f"{WRITING}.rows=6",
    f"{WRITING}.shortest=1", f"{WRITING}.scripts=latin", "--config.rollout.batch_size=16",
    "--config.optimizer.micro_batch=8", "--config.evaluation.benchmarks=()", "--config.steps=3",
]  # fmt: skip


@pytest.fixture
def writer(tmp_path):
    """A random model with the quickstart's tokenizer: about half of its texts end, and all letters occur in them."""
    torch.manual_seed(0)
    shutil.copytree(GENERALIST, tmp_path / "writer")
    config = transformers.AutoConfig.from_pretrained(GENERALIST)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


@pytest.mark.slow
def test_a_run_writes_its_prompts_once(command, tmp_path, writer):
    workdir = tmp_path / "run"
    folder = workdir / "self_prompts" / "recovery"
    flags = [*WRITES, f"--config.general_model={writer}", f"--workdir={workdir}"]
    checked = command("doctor", *flags)
    assert checked.code == 0, checked.out
    assert "writes 6 prompts of at most 61 tokens before the first step" in " ".join(checked.out.split())

    command.start("train", *flags).when((folder / "texts" / "0.jsonl").exists, signal.SIGKILL)
    assert not (folder / "manifest.json").exists() and not (workdir / "config.json").exists()
    first = (folder / "texts" / "0.jsonl").read_text().splitlines()[0]
    ended = command("train", *flags)
    assert ended.code == 0, ended.err
    assert not (folder / "texts").exists() and first
    rows, once = read_lines(folder / "prompts.jsonl"), (folder / "prompts.jsonl").read_bytes()
    prompts = {row["messages"][0]["content"] for row in rows}
    assert len(prompts) == len(rows) <= 6
    assert f"wrote {len(rows)} prompts of recovery" in ended.out
    read = [row["prompt"] for row in read_lines(workdir / "samples.jsonl") if row["phase"] == "recovery"]
    assert read and {text.removeprefix("<|user|>").partition("<|end|>")[0] for text in read} <= prompts

    again = command("train", *flags)
    assert again.code == 0 and "wrote" not in again.out
    assert (folder / "prompts.jsonl").read_bytes() == once
    checked = command("doctor", *flags)
    assert checked.code == 0 and f"{len(rows)} prompts of " in " ".join(checked.out.split())

    (folder / "prompts.jsonl").write_bytes(once + once)
    spoilt = command("train", *flags)
    assert spoilt.code == 2 and "changed since it was written" in spoilt.err
    other = command("prompts", "map", *flags[:-1], f"--out={tmp_path / 'map.json'}")
    assert other.code == 2 and "config.branches.recovery.prompts.source is 'self'" in other.err
