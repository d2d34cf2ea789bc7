"""launch_tpu.sh: what --dry-run prints, and what it does with a gcloud that answers from a script."""

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch_tpu.sh"
FLAGS = ["--name=t", "--zone=us-central2-b", "--type=v4-32"]
RUN = ["--", "--config=configs/medqa.py", "--workdir=gs://b/run dir"]

# Keeps every call; `describe` tells the next line of states, `ssh` ends with the next line of codes.
GCLOUD = """#!/usr/bin/env bash
cd "$(dirname "$0")"
printf '%s\\n' "${*//$'\\n'/ ; }" >> calls
next() { head -n1 "$1"; sed -i 1d "$1"; }
case "$4" in
  describe) state="$(next states)"; [[ "$state" != NONE ]] || exit 1; echo "$state" ;;
  ssh) [[ "$*" == *CAMOPD_DISTRIBUTED* ]] || exit 0; exit "$(next codes)" ;;
esac
"""


def dry(*flags):
    return subprocess.run([SCRIPT, *flags], capture_output=True, text=True)


@pytest.fixture
def cloud(tmp_path):
    """cloud(states, codes, *flags) -> (exit code, gcloud's calls, stderr)."""

    def run(states, codes, *flags):
        (tmp_path / "gcloud").write_text(GCLOUD)
        (tmp_path / "gcloud").chmod(stat.S_IRWXU)
        (tmp_path / "states").write_text("".join(f"{s}\n" for s in states))
        (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LAUNCH_TPU_WAIT": "0"}
        ended = subprocess.run(
            [SCRIPT, *FLAGS, *flags, *RUN], capture_output=True, text=True, env=environment, timeout=60
        )
        calls = [line.removeprefix("compute tpus tpu-vm ") for line in (tmp_path / "calls").read_text().splitlines()]
        return ended.returncode, calls, ended.stderr

    return run


def verbs(calls):
    return ["start" if "CAMOPD_DISTRIBUTED" in c else c.split()[0] for c in calls]


def test_dry_run_prints_every_command_and_runs_none():
    ended = dry(*FLAGS, "--spot", "--delete", "--project=p", "--dry-run", *RUN)
    assert ended.returncode == 0, ended.stderr
    commands = [shlex.split(block) for block in ended.stdout.split("+ ")[1:]]
    tpu = [c[4:] for c in commands if c[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]]
    assert [c[0] for c in tpu] == ["create", "scp", "ssh", "ssh", "delete"]
    create, scp, install, start, delete = tpu
    assert create == ["create", "t", "--zone=us-central2-b", "--project=p", "--accelerator-type=v4-32",
                      "--version=tpu-ubuntu2204-base", "--spot"]  # fmt: skip
    assert "--worker=all" in scp and "--worker=all" in install and "--worker=all" in start
    assert "./camopd_jax[tpu]" in install[-1]
    words = shlex.split(start[-1])
    assert words[words.index("CAMOPD_DISTRIBUTED=1") :] == [
        "CAMOPD_DISTRIBUTED=1", ".venv/bin/python", "-m", "camopd_jax.train", "--config=configs/medqa.py",
        "--workdir=gs://b/run dir"]  # fmt: skip
    assert delete[-1] == "--quiet"


def test_a_new_tpu_is_made_installed_and_started(cloud):
    code, calls, _ = cloud(["NONE"], [0])
    assert code == 0 and verbs(calls) == ["describe", "create", "scp", "ssh", "start"]


def test_a_tpu_that_is_there_is_taken_again(cloud):
    code, calls, _ = cloud(["CREATING", "READY"], [0])
    assert code == 0 and verbs(calls) == ["describe", "describe", "scp", "ssh", "start"]


def test_after_preemption_it_is_made_anew_and_the_same_command_started(cloud):
    code, calls, _ = cloud(["READY", "PREEMPTED", "PREEMPTED"], [1, 0], "--delete")
    assert code == 0
    assert verbs(calls) == ["describe", "scp", "ssh", "start", "describe", "describe", "delete", "create", "scp", "ssh",
                            "start", "delete"]  # fmt: skip
    first, second = (c for c in calls if "CAMOPD_DISTRIBUTED" in c)
    assert first == second


def test_a_lost_connection_starts_again_and_a_mistake_does_not(cloud):
    code, calls, _ = cloud(["READY", "READY"], [255, 0])
    assert code == 0 and verbs(calls).count("start") == 2
    code, calls, err = cloud(["READY", "READY"], [2])
    assert code == 2 and "ended with exit code 2 on a TPU that is up" in err


@pytest.mark.parametrize(
    "flags, says",
    [
        (FLAGS[1:] + RUN, "--name is missing"),
        (FLAGS[:2] + RUN, "--type is missing"),
        ([*FLAGS, "--"], "--workdir=gs://... is missing"),
        ([*FLAGS, "--", "--workdir=runs/x"], "--workdir=gs://... is missing"),
        (["--nam=t", *RUN], "--nam=t is not an option"),
    ],
)
def test_mistakes(flags, says):
    ended = dry(*flags)
    assert ended.returncode == 2 and says in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_help():
    ended = dry("--help")
    assert ended.returncode == 0 and "--dry-run" in ended.stdout
