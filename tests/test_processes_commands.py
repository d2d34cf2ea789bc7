"""Other commands with the flags for several processes: two processes of four devices write the same as one of eight."""

import json
import re

import numpy as np
import pytest
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import chat_row, read_lines, write_lines
from safetensors.numpy import load_file

CONFIG = [
    PAPER_CONFIG,
    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8",
    "--config.rollout.max_response_tokens=16", "--config.evaluation.batch_size=8", "--config.log.report=false",
    "--config.diagnostics.rows=8", "--config.mesh.data=1", "--config.mesh.fsdp=8",
]  # fmt: skip
TEXTS = [
    "reverse: abcd",
    "sort: cab",
    "add: 12 and 3",
    "shift: abc",
    "reverse: xyz",
    "sort: zyxw",
    "swap: ab",
    "add: 1 and 1",
]
GLOO = set("Gloo Rank is connected to peer ranks Expected number of".split())  # its lines, which may run into another
TASK = """
task: reversing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def generate(folder, out):
    prompts = write_lines(folder / "prompts.jsonl", [chat_row(text) for text in TEXTS])
    return [f"--model={QUICKSTART / 'specialist'}", f"--input={prompts}", f"--output={out}/answers.jsonl",
            "--max_new_tokens=12", "--temperature=1", "--batch_size=8"]  # fmt: skip


def score(folder, out):
    rows = [chat_row(text) | {"response": text[::-1]} for text in TEXTS]
    answers = write_lines(folder / "answers.jsonl", rows)
    return [
        f"--model={QUICKSTART / 'specialist'}",
        f"--input={answers}",
        f"--output={out}/scores.jsonl",
        "--batch_size=8",
    ]


def sft(folder, out):
    rows = [chat_row(text, text[::-1]) for text in TEXTS]
    (folder / "sft.py").write_text(
        "from camopd_jax.config import SftConfig, default\n\n\ndef get_config():\n"
        f"    config = default(SftConfig)\n    config.model = {str(QUICKSTART / 'generalist')!r}\n"
        f"    config.data.source = {str(write_lines(folder / 'rows.jsonl', rows))!r}\n"
        "    config.steps = 2\n    config.batch_size = 8\n    config.optimizer.micro_batch = 8\n"
        "    config.optimizer.learning_rate = 1e-4\n    config.optimizer.eps = 1e-5\n"
        "    config.max_tokens = 64\n    config.log.report = False\n    return config\n"
    )
    return [f"--config={folder / 'sft.py'}", f"--workdir={out}/run"]


def evaluate(folder, out):
    return [*CONFIG, f"--checkpoint={QUICKSTART / 'generalist'}", f"--workdir={out}/evaluation"]


def analyze(folder, out):
    return [*CONFIG, f"--out={out}/analysis.jsonl"]


def interpolate(folder, out):
    return [*CONFIG, "--weight=0.3", f"--out={out}/between"]


def lm_eval(folder, out):
    rows = [{"question": text, "answer": text.split()[1][::-1]} for text in TEXTS if text.startswith("reverse")]
    file = write_lines(folder / "questions.jsonl", rows)
    (folder / "reversing.yaml").write_text(TASK.format(file=file))
    return ["--model", "camopd_jax", "--model_args", f"path={QUICKSTART / 'generalist'}", "--batch_size", "8",
            "--apply_chat_template", "--tasks", "reversing", "--include_path", folder, "--output_path", out,
            "--log_samples"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, arguments",
    [(f.__name__, f) for f in (generate, score, sft, evaluate, analyze, interpolate, lm_eval)],
)
def test_two_processes_write_the_same_as_one(command, pair, tmp_path, module, arguments):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    alone = command(module, *arguments(tmp_path, tmp_path / "one"), devices=8, env=env)
    assert alone.code == 0, alone.err
    leader, other = pair(module, *arguments(tmp_path, tmp_path / "two"), env=env).wait()
    assert (leader.code, other.code) == (0, 0), leader.err + other.err
    same_files(tmp_path / "one", tmp_path / "two")
    assert set(re.findall(r"[A-Za-z]+", other.out)) <= GLOO
    assert "error" not in leader.err + other.err


@pytest.mark.slow
def test_export_of_two_processes(command, pair, tmp_path):
    run = tmp_path / "run"
    flags = [*CONFIG, f"--workdir={run}", "--config.steps=1", "--config.evaluation.benchmarks=()"]
    assert command("train", *flags, devices=8).code == 0
    leader, other = pair("export", f"--workdir={run}", f"--out={tmp_path / 'out'}").wait()
    assert (leader.code, other.code) == (0, 0), leader.err + other.err
    same_tensors(tmp_path / "out" / "model.safetensors", run / "export" / "model.safetensors", exact=True)


def same_files(one, two):
    """Asserts equal files, except for rounding, times and paths."""
    files = {name_of(f, one): f for f in one.rglob("*") if f.is_file()}
    others = {name_of(f, two): f for f in two.rglob("*") if f.is_file()}
    kept = {name for name in files if "checkpoints" not in name and "tensorboard" not in name}
    assert kept == {name for name in others if "checkpoints" not in name and "tensorboard" not in name}
    for name in kept:
        if name.endswith(".safetensors"):
            same_tensors(files[name], others[name])
        elif name.endswith(".jsonl"):
            same(read_lines(files[name]), read_lines(others[name]), name)
        elif name == "results.json":
            same(*(json.loads(file.read_text())["results"] for file in (files[name], others[name])), name)


def name_of(file, folder):
    """A file's path in a folder, without the time in lm_eval's file names."""
    name = str(file.relative_to(folder))
    return "results.json" if "results_" in name else "samples.jsonl" if "samples_" in name else name


def same(a, b, where):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a.keys() - {"seconds", "tokens_per_second", "memory_gib"}:
            same(a[name], b[name], f"{where} {name}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where} {i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4, nan_ok=True), where
    else:
        assert a == b, where


def same_tensors(file, other, exact=False):
    ours, theirs = load_file(file), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=0 if exact else 1e-5, err_msg=name)
