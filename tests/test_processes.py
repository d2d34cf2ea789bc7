"""`train` with two processes of four simulated devices, like two hosts, against one process of eight devices.

Every process has a time limit, so no test hangs.
"""

import re
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from quickstart import PAPER_CONFIG
from rows import read_lines
from safetensors.numpy import load_file

from camopd_jax.errors import UserError
from camopd_jax.runtime import cluster, termination

ROOT = Path(__file__).parents[1]
STEPS = 3
SMALL = [
    PAPER_CONFIG,
    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8",
    "--config.rollout.max_response_tokens=16", "--config.rollout.smallest_bucket=64", "--config.checkpoints.every=2",
    "--config.checkpoints.keep_last=9", "--config.compute.remat=none", "--config.evaluation.batch_size=8",
    "--config.log.report=false", "--config.optimizer.eps=1e-5",  # with less, rounding may move a weight by a whole step
    "--config.optimizer.schedule=constant",  # a run may then continue for more steps
]  # fmt: skip
NO_BENCHMARKS = "--config.evaluation.benchmarks=()"
SPLIT = [
    "--config.mesh.data=1",
    "--config.mesh.fsdp=4",
    "--config.mesh.tensor=2",
]  # each process holds half of a matrix


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file: the quickstart's, with two benchmarks of a few questions."""
    file = tmp_path_factory.mktemp("config") / "few.py"
    file.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('whole', {str(ROOT / 'configs/quickstart.py')!r})\n"
        "whole = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(whole)\n"
        "def get_config():\n"
        "    config = whole.get_config(method='camopd')\n"
        "    first, _, last = config.evaluation.benchmarks\n"
        "    few = dict(limit=8, max_response_tokens=16)\n"
        "    config.evaluation.benchmarks = (dict(first) | few, dict(last) | few)\n"
        "    return config\n"
    )
    return f"--config={file}"


@pytest.fixture(scope="module")
def two(pair, config, tmp_path_factory):
    """A run of two processes with evaluations and a report: (work directory, how each process ended)."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    flags = [config, *SMALL[1:], *SPLIT, f"--config.steps={STEPS}", "--config.log.report=true"]
    ended = pair("train", f"--workdir={workdir}", *flags, "--config.evaluation.every=3").wait()
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    return workdir, ended


@pytest.fixture(scope="module")
def one(command, tmp_path_factory):
    """The work directory of the same run in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    flags = [*SMALL, NO_BENCHMARKS, f"--config.steps={STEPS}"]
    ended = command("train", f"--workdir={workdir}", *flags, devices=8)
    assert ended.code == 0, ended.err
    return workdir


def weights(workdir):
    return load_file(workdir / "export" / "model.safetensors")


def same_run(workdir, other):
    """Asserts equal losses, selections and parameters, up to rounding."""
    for name in ("metrics", "selection"):
        ours, theirs = (read_lines(w / f"{name}.jsonl") for w in (workdir, other))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            exact = ("response_tokens", "repetition", "selected_fraction", "index", "selected", "length")
            assert {n: a[n] for n in exact if n in a} == {n: b[n] for n in exact if n in b}
            if name == "metrics":
                np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
    ours, theirs = weights(workdir), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-5, err_msg=name)  # a step moves by 2e-4


def steps_seen(workdir, n):
    file = workdir / "metrics.jsonl"
    return lambda: file.exists() and len(file.read_text().splitlines()) >= n


def last_line(process, seconds=10):
    """The last line on stderr, which may be printed shortly after the end of the process."""
    end = time.monotonic() + seconds
    while not (lines := process.err.read_text().strip().splitlines()) or not lines[-1].startswith("error: "):
        assert time.monotonic() < end, lines[-1:]
        time.sleep(0.05)
    return lines[-1]


# ------------------------------------------------------------------------------ a whole run


@pytest.mark.slow
def test_two_processes_equal_one(two, one):
    same_run(two[0], one)


@pytest.mark.slow
def test_only_process_0_writes_and_prints(two):
    workdir, (leader, other) = two
    assert {p.name for p in workdir.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "selection.jsonl", "eval.jsonl", "answers", "checkpoints",
        "lock", "tensorboard", "export", "report.html",
    }  # fmt: skip
    assert [row["step"] for row in read_lines(workdir / "metrics.jsonl")] == list(range(STEPS))
    assert [row["step"] for row in read_lines(workdir / "selection.jsonl")] == list(range(STEPS))
    assert [row["step"] for row in read_lines(workdir / "samples.jsonl")] == sorted(2 * list(range(STEPS)))
    rows = [(r["model"], r["step"], r["benchmark"]) for r in read_lines(workdir / "eval.jsonl")]
    evaluations = [(model, step, name) for model, step in (("general", 0), ("specialised", 0), ("student", STEPS))
             for name in ("covered", "domain")]  # fmt: skip
    assert rows == [*evaluations, ("student", STEPS, "standing")]
    for file in (workdir / "answers").glob("*/*.jsonl"):
        questions = [row["question"] for row in read_lines(file)]
        assert sorted(questions) == list(range(8)) and all("score" in row for row in read_lines(file)), file
    assert len(list((workdir / "answers").glob("*/*.jsonl"))) == 6
    assert len(list((workdir / "tensorboard").glob("events.*"))) == 1
    for words in ("recovery prompts: ", f"step {STEPS}/{STEPS} recovery", "student at step", "exported: ", "recovered"):
        assert words in leader.out and words not in other.out


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_by_one(two, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two[0], workdir, ignore=shutil.ignore_patterns("export"))
    ended = command("train", f"--workdir={workdir}", *SMALL, NO_BENCHMARKS, f"--config.steps={STEPS}")
    assert ended.code == 0, ended.err
    assert f"continuing from step {STEPS}" in ended.out
    for name, tensor in weights(workdir).items():
        np.testing.assert_array_equal(tensor, weights(two[0])[name], err_msg=name)


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--process_id=0"],
            "--coordinator_address is missing; ",
        ),
        (["--coordinator_address=a:1", "--process_id=0"], "--num_processes is missing"),
        (["--coordinator_address=a:1", "--num_processes=2"], "--process_id is missing"),
        (
            ["--coordinator_address=a", "--num_processes=2", "--process_id=0"],
            "--coordinator_address=a: give the host of",
        ),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2: give each of the 2"),
        (["--coordinator_address=a:1", "--num_processes=0", "--process_id=0"], "--num_processes=0: give a number > 0"),
        (["--coordinator_address=a:1", "--num_processes=x", "--process_id=0"], "num_processes"),
    ],
)
def test_invalid_flags(command, tmp_path, flags, message):
    ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, *flags)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1, ended.err


def test_a_port_in_use(command, tmp_path):
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"]
        ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, *flags)
    assert ended.code == 2 and f"--coordinator_address={address}: process 0 cannot listen there" in ended.err


def test_an_error_on_one_host_ends_all_processes(pair, tmp_path):
    of_each = [[f"--workdir={tmp_path / 'run'}"], [f"--workdir={tmp_path / 'run'}", "--config.seed=3"]]
    leader, other = pair("train", *SMALL, NO_BENCHMARKS, of_each=of_each).wait(90)
    reason = "its config differs from that of process 0 (config.seed); give the same command on every host"
    assert (leader.code, other.code) == (2, 2), leader.err + other.err
    assert f"error: process 1 cannot continue: {reason}" in leader.err and f"error: {reason}" in other.err


# ------------------------------------------------------------------------------ signals and lost processes


@pytest.mark.slow
def test_sigterm_stops_all_processes_and_one_or_two_resume(pair, command, tmp_path, one):
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", *SMALL, NO_BENCHMARKS, "--config.checkpoints.every=50"]
    both = pair("train", *flags, *SPLIT, "--config.steps=50")
    both.processes[1].when(steps_seen(workdir, 1), signal.SIGTERM)
    leader, other = both.wait()
    assert (leader.code, other.code) == (0, 0), leader.err + other.err
    (saved,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert f"stopped by a signal: saved at step {saved}" in leader.out and "stopped by a signal" not in other.out
    assert len(read_lines(workdir / "metrics.jsonl")) == saved

    ended = command("train", *flags, f"--config.steps={saved + 1}")  # one device
    assert ended.code == 0 and f"continuing from step {saved}" in ended.out, ended.err
    leader, other = pair("train", *flags, *SPLIT, f"--config.steps={saved + 3}").wait()
    assert leader.code == 0 and f"continuing from step {saved + 1}" in leader.out, leader.err

    whole = tmp_path / "whole"
    shutil.copytree(one, whole)
    ended = command("train", f"--workdir={whole}", *flags[1:], f"--config.steps={saved + 3}", devices=8)
    assert ended.code == 0, ended.err
    same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(pair, tmp_path, victim, one):
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", *SMALL, NO_BENCHMARKS, *SPLIT, "--config.steps=50"]
    both = pair("train", *flags)
    ended = both.processes[victim].when((workdir / "checkpoints" / "2").exists, signal.SIGKILL)
    assert ended.code == -signal.SIGKILL
    left = both.processes[1 - victim]
    assert left.wait(cluster.HEARTBEAT_TIMEOUT + 30).code not in (0, 2)
    assert "another process of the run was lost" in last_line(left) and "from its last checkpoint" in last_line(left)
    leader, _ = pair("train", *flags, f"--config.steps={STEPS}").wait()
    assert leader.code == 0 and "continuing from step 2" in leader.out, leader.err
    same_run(workdir, one)


@pytest.mark.slow
def test_a_hanging_process_is_detected_in_time(pair, tmp_path):
    workdir = tmp_path / "run"
    both = pair("train", f"--workdir={workdir}", *SMALL, NO_BENCHMARKS, "--config.steps=5000")
    hangs, left = both.processes[1], both.processes[0]
    deadline = time.monotonic() + 240
    while not steps_seen(workdir, 1)():
        assert time.monotonic() < deadline, left.err.read_text()
        time.sleep(0.05)
    hangs.send(signal.SIGSTOP)
    assert left.wait(cluster.HEARTBEAT_TIMEOUT + 30).code not in (0, 2)
    assert "another process of the run was lost" in last_line(left)


# ------------------------------------------------------------------------------ detection on Cloud TPU


@pytest.mark.parametrize(
    "setting, error, message",
    [
        ("", ValueError("coordinator_address should be defined."), None),  # a TPU host without a cluster: alone
        ("", ConnectionError("no metadata"), "the other processes cannot be found (no metadata); name them with"),
        ("1", ValueError("coordinator_address should be defined."), "the other processes cannot be found (coordinator"),
    ],
)
def test_failed_detection(monkeypatch, setting, error, message):
    def search(**_):
        raise error

    monkeypatch.setenv("CAMOPD_DISTRIBUTED", setting)
    monkeypatch.setattr(cluster, "_on_cloud_tpu", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", search)
    if message:
        with pytest.raises(UserError, match=re.escape(message)):
            cluster.join(None)
    else:
        cluster.join(None)
    assert not termination.in_cluster()


def test_no_detection_without_a_tpu_or_if_turned_off(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("it searched"))
    monkeypatch.delenv("CAMOPD_DISTRIBUTED", raising=False)
    cluster.join(None)
    monkeypatch.setenv("CAMOPD_DISTRIBUTED", "0")
    monkeypatch.setattr(cluster, "_on_cloud_tpu", lambda: True)
    cluster.join(None)
