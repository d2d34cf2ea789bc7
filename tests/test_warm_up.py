"""Runs that begin with cross-entropy on the teachers' answers."""

import signal

import numpy as np
import pytest
from quickstart import PAPER_CONFIG
from rows import read_lines
from safetensors.numpy import load_file

QUICKSTART = [
    PAPER_CONFIG,
    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8",
    "--config.evaluation.benchmarks=()", "--config.checkpoints.every=3", "--config.checkpoints.keep_last=9",
]  # fmt: skip
WARM_UP = [
    *QUICKSTART, "--config.steps=7", "--config.warm_up.steps=4", "--config.warm_up.learning_rate=1e-3",
    "--config.warm_up.prompts=24",
]  # fmt: skip


def files(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "teacher_answers").iterdir()}


@pytest.mark.slow
def test_a_run_killed_in_the_warm_up_and_started_again_gives_the_same_bits(command, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    ended = command("train", f"--workdir={once}", *WARM_UP)
    assert ended.code == 0, ended.err
    metrics, selection = (read_lines(once / f"{name}.jsonl") for name in ("metrics", "selection"))
    phases = ["warm_up/recovery"] * 3 + ["warm_up/review"] + ["recovery"] * 3
    assert [row["phase"] for row in metrics] == [row["phase"] for row in selection] == phases
    # Each part has a cosine of its own: from 1e-3 over 4 steps, then from 2e-4 over 3 steps
    rates = [1e-3 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    rates += [2e-4 * (1 + np.cos(np.pi * i / 3)) / 2 for i in range(3)]
    np.testing.assert_allclose([row["learning_rate"] for row in metrics], rates, rtol=1e-5)
    for row, of_answers in zip(metrics[:4], selection, strict=False):
        assert row["selected_fraction"] == 1 and "sampler_gap" not in row
        assert row["loss"] == pytest.approx(np.mean(of_answers["student_loss"]), abs=1e-4), "cross-entropy, scale 1"
    assert metrics[2]["loss"] < metrics[0]["loss"]

    answers = {name: read_lines(once / "teacher_answers" / f"{name}.jsonl") for name in ("recovery", "review")}
    assert {name: len(rows) for name, rows in answers.items()} == {"recovery": 24, "review": 16}
    assert {row["teacher"] for row in answers["recovery"]} == {"general"}
    assert all(row["prompt"].startswith("<|user|>") and row["response"] for row in answers["review"])
    pairs = {(row["prompt"], row["response"]) for rows in answers.values() for row in rows}
    trained = [row for row in read_lines(once / "samples.jsonl") if row["phase"].startswith("warm_up/")]
    assert len(trained) == 8 and {(row["prompt"], row["response"].removesuffix("<|end|>")) for row in trained} <= pairs
    page, card = (once / "report.html").read_text(), (once / "export" / "README.md").read_text()
    assert "warm_up/recovery" in page
    assert "CaMOPD (arXiv 2605.27115), after a warm-up on the teachers' answers" in card

    def in_the_warm_up():
        return (twice / "metrics.jsonl").exists() and len((twice / "metrics.jsonl").read_text().splitlines()) >= 2

    command.start("train", f"--workdir={twice}", *WARM_UP).when(in_the_warm_up, signal.SIGKILL)
    assert files(twice) == files(once)
    ended = command("train", f"--workdir={twice}", *WARM_UP)
    assert ended.code == 0, ended.err
    assert files(twice) == files(once) and read_lines(twice / "samples.jsonl") == read_lines(once / "samples.jsonl")
    ours, theirs = (load_file(workdir / "export" / "model.safetensors") for workdir in (twice, once))
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    assert sorted(int(path.name) for path in (once / "checkpoints").glob("[0-9]*")) == [3, 4, 6, 7]


@pytest.mark.slow
def test_a_mixed_warm_up_on_any_mesh(command, tmp_path):
    """Every branch in each step; eight devices give the same losses as one."""
    flags = [*QUICKSTART, "--config.steps=3", "--config.warm_up.steps=2", "--config.method.schedule=mixed",
             "--config.branches.recovery.steps=1", "--config.log.report=false", "--config.evaluation.batch_size=16",
             "--config.compute.offload=late"]  # fmt: skip
    ended = command("train", f"--workdir={tmp_path / 'one'}", *flags)
    assert ended.code == 0, ended.err
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    ended = command("train", f"--workdir={tmp_path / 'eight'}", *flags, *mesh, devices=8)
    assert ended.code == 0, ended.err
    one, eight = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    assert [row["phase"] for row in one] == ["warm_up/mixed"] * 2 + ["mixed"]
    for row, other in zip(one, eight, strict=True):
        prefix = "warm_up/" if row["step"] < 2 else ""
        for branch in ("recovery", "review"):
            assert row[prefix + branch]["loss"] == pytest.approx(other[prefix + branch]["loss"], rel=1e-3, abs=1e-5)
    losses = [(row["warm_up/recovery"]["loss"] + row["warm_up/review"]["loss"]) / 2 for row in one[:2]]
    np.testing.assert_allclose([row["loss"] for row in one[:2]], losses, rtol=1e-6)
