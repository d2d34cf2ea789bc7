"""launch_tpu.sh: --dry-run, behaviour with a scripted gcloud, and the part that runs on a worker."""

import os
import shlex
import shutil
import signal
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch_tpu.sh"
FLAGS = ["--name=t", "--zone=us-central2-b", "--type=v4-32"]
RUN = ["--", "--config=configs/medqa.py", "--workdir=gs://b/run dir"]
WHERE = ["t", "--zone=us-central2-b"]

# A gcloud that records every call. Files have the coming replies, one per line: of `describe` for each kind, of
# `create`, and the exit codes of the command (`codes`) and of other `ssh` calls (`ssh`). Without a line, a call
# succeeds.
GCLOUD = """#!/usr/bin/env bash
cd "$(dirname "$0")"
printf '%s\\n' "${*//$'\\n'/ ; }" >> calls
next() { head -n1 "$1" 2>/dev/null; sed -i 1d "$1" 2>/dev/null; }
case "$4" in
  describe)
    said="$(next "$3")"
    case "$said" in
      NONE) echo "ERROR: (gcloud.compute.tpus.$3.describe) NOT_FOUND: Resource 't' was not found" >&2; exit 1 ;;
      offline) echo "ERROR: no network" >&2; exit 1 ;;
    esac
    echo "$said" ;;
  create) said="$(next create)"; [[ -z "$said" ]] || { echo "$said" >&2; exit 1; } ;;
  scp) cp "$5" archive ;;
  ssh) [[ "$*" == *--here=* ]] && code="$(next codes)" || code="$(next ssh)"; exit "${code:-0}" ;;
esac
"""
NO_CAPACITY = '{ "code": 8, "message": "There is no more capacity in the zone" }'
START = ["ssh stop", "scp", "ssh install", "start"]


def dry(*flags):
    return subprocess.run([SCRIPT, *flags], capture_output=True, text=True)


class Ended:
    def __init__(self, ended, folder):
        self.code, self.out, self.err, self.folder = ended.returncode, ended.stdout, ended.stderr, folder
        self.calls = [line.removeprefix("compute tpus ") for line in (folder / "calls").read_text().splitlines()]

    def verbs(self, *hidden):
        """The verbs of all calls; for queued resources "queue VERB"."""
        verbs = [_verb(call) for call in self.calls]
        return [verb for verb in verbs if verb not in hidden]


def _verb(call):
    kind, verb = call.split()[:2]
    if verb == "ssh":
        verb = "start" if "--here=" in call else "ssh install" if "uv venv" in call else "ssh stop"
    return f"queue {verb}" if kind == "queued-resources" else verb


@pytest.fixture
def cloud(tmp_path):
    """cloud(*flags, tpu=[states], queue=[states], codes=[...], create=[messages], ssh=[codes]) -> Ended."""

    def run(*flags, tpu=(), queue=(), codes=(), create=(), ssh=(), **environment):
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "gcloud").write_text(GCLOUD)
        (tmp_path / "gcloud").chmod(stat.S_IRWXU)
        answers = {"tpu-vm": tpu, "queued-resources": queue, "codes": codes, "create": create, "ssh": ssh}
        for name, lines in answers.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LAUNCH_TPU_WAIT": "0"} | environment
        ended = subprocess.run(
            [SCRIPT, *FLAGS, *flags, *RUN], capture_output=True, text=True, env=os.environ | environment, timeout=60
        )
        return Ended(ended, tmp_path)

    return run


# ------------------------------------------------------------------------------------ printed commands


def commands(printed):
    """The printed commands, split into words as by bash."""
    found = []
    for line in printed.splitlines():
        if line.startswith("+ "):
            read = ["bash", "-c", 'eval "set -- ${1:2}"; printf "%s\\0" "$@"', "-", line]
            found.append(subprocess.run(read, capture_output=True, text=True, check=True).stdout.split("\0")[:-1])
    return found


def test_dry_run_only_prints_commands():
    ended = dry(*FLAGS, "--spot", "--delete", "--project=p", "--dry-run", *RUN)
    assert ended.returncode == 0, ended.stderr
    tpu = [c[4:] for c in commands(ended.stdout) if c[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]]
    assert [c[0] for c in tpu] == ["describe", "create", "describe", "ssh", "scp", "ssh", "ssh", "delete"]
    _, create, _, _, scp, install, start, delete = tpu
    assert create == ["create", *WHERE, "--project=p", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base",
                      "--spot"]  # fmt: skip
    assert all("--worker=all" in c for c in tpu if c[0] in ("ssh", "scp"))
    assert "./camopd_jax[tpu]" in install[-1] and scp[2] == "t:camopd_jax.tar.gz"
    words = shlex.split(start[-1].removeprefix("--command="))
    assert words[:5] == ["cd", "camopd_jax", "&&", "bash", "launch_tpu.sh"] and words[5].startswith("--here=")
    assert words[6:] == ["--module=camopd_jax.train", *RUN]
    assert delete == ["delete", *WHERE, "--project=p", "--quiet"]


def test_dry_run_of_a_queued_resource():
    ended = dry(*FLAGS, "--spot", "--queued", "--delete", "--dry-run", *RUN)
    queue = [c[4:] for c in commands(ended.stdout) if c[3:4] == ["queued-resources"]]
    assert [c[0] for c in queue] == ["describe", "create", "describe", "delete"]
    assert queue[0] == ["describe", *WHERE, "--format=value(state.state)"]
    assert queue[1] == ["create", *WHERE, "--accelerator-type=v4-32", "--node-id=t",
                        "--runtime-version=tpu-ubuntu2204-base", "--spot"]  # fmt: skip
    assert queue[3] == ["delete", *WHERE, "--force", "--quiet"]


@pytest.mark.parametrize(
    "kind, image", [("v6e-8", "v2-alpha-tpuv6e"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5")]
)
def test_each_generation_has_its_image(kind, image):
    assert f"--version={image} " in dry(*FLAGS, f"--type={kind}", "--dry-run", *RUN).stdout.replace("\n", " ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (FLAGS[1:] + RUN, "--name is missing"),
        (FLAGS[:2] + RUN, "--type is missing"),
        ([*FLAGS, "--"], "--workdir=gs://... is missing"),
        ([*FLAGS, "--", "--workdir=runs/x"], "--workdir=gs://... is missing"),
        (["--nam=t", *RUN], "--nam=t is not an option"),
        ([*FLAGS, "--with=nowhere", *RUN], "--with=nowhere: give a path inside this checkout"),
        ([*FLAGS, "--env=NOT_SET_HERE", *RUN], "--env=NOT_SET_HERE: it is not set here"),
    ],
)
def test_mistakes(flags, message):
    ended = dry(*flags)
    assert ended.returncode == 2 and message in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_help():
    ended = dry("--help")
    assert ended.returncode == 0 and "--dry-run" in ended.stdout


# ---------------------------------------------------------------------------------- getting a TPU


def test_a_new_tpu_is_created_and_started(cloud):
    ended = cloud(tpu=["NONE", "READY"])
    assert ended.code == 0 and ended.verbs() == ["describe", "create", "describe", *START]


def test_an_existing_tpu_is_used(cloud):
    assert cloud(tpu=["CREATING", "READY"]).verbs("describe") == START
    assert cloud(tpu=["STOPPED", "READY"]).calls[1].split()[1] == "start"


def test_retries_without_capacity_but_not_after_a_refusal(cloud):
    ended = cloud(tpu=["NONE", "NONE", "READY"], create=[NO_CAPACITY])
    assert ended.code == 0 and ended.verbs("describe") == ["create", "create", *START]
    for refusal in ("INVALID_ARGUMENT: accelerator type", '"code": 8, "message": "Quota limit exceeded"'):
        ended = cloud(tpu=["NONE"], create=[refusal])
        assert ended.code == 2 and refusal in ended.err and ended.verbs("describe") == ["create"]
        assert ended.err.splitlines()[-1].startswith("error: gcloud cannot create t")


def test_an_unknown_state_does_not_mean_absent(cloud):
    ended = cloud(tpu=["offline"])
    assert ended.code == 2 and ended.verbs() == ["describe"] and "no network" in ended.err
    ended = cloud(tpu=["READY", "offline", "offline", "READY", "READY"], codes=[1])
    assert ended.code == 0 and "create" not in ended.verbs()


def test_waits_in_the_queue(cloud):
    waiting = ["NONE", "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    ended = cloud("--queued", queue=[*waiting, "ACTIVE"], tpu=["READY"])
    assert ended.code == 0
    assert ended.verbs("queue describe") == ["queue create", "describe", *START]
    assert ended.out.count("t is WAITING_FOR_RESOURCES") == 1


def test_a_failed_request_is_repeated_a_few_times(cloud):
    failure = ["FAILED", "stockout"]
    ended = cloud("--queued", queue=[*failure, "NONE", *failure, "NONE", "ACTIVE"], tpu=["READY"])
    assert ended.code == 0
    assert ended.verbs("queue describe")[:4] == ["queue delete", "queue create"] * 2
    ended = cloud("--queued", queue=[*failure, "NONE", *failure, "NONE", *failure])
    assert ended.code == 1 and "why: stockout" in ended.out and "failed 3 times" in ended.err
    assert ended.verbs("queue describe")[-1] == "queue create"


# ----------------------------------------------------------------------- preemption and failures


def test_after_preemption_a_new_tpu_runs_the_same_command(cloud):
    ended = cloud("--delete", tpu=["READY", "PREEMPTED", "PREEMPTED", "NONE", "READY"], codes=[1, 0])
    assert ended.code == 0
    assert ended.verbs("describe") == [*START, "delete", "create", *START, "delete"]
    first, second = (call.split(" --module=")[1] for call in ended.calls if "--here=" in call)
    assert first == second


def test_a_suspended_request_is_replaced(cloud):
    ended = cloud(
        "--queued", "--spot", "--delete",
        queue=["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "NONE", "PROVISIONING", "ACTIVE"],
        tpu=["READY", "READY"], codes=[143, 0],
    )  # fmt: skip
    assert ended.code == 0
    assert ended.verbs("queue describe", "describe") == [*START, "queue delete", "queue create", *START, "queue delete"]
    assert all("--force" in call for call in ended.calls if call.startswith("queued-resources delete"))


def test_an_active_request_without_a_tpu_is_replaced(cloud):
    ended = cloud("--queued", queue=["ACTIVE", "NONE", "ACTIVE"], tpu=["NONE", "READY"])
    assert ended.verbs("queue describe", "describe") == ["queue delete", "queue create", *START]


def test_preemption_during_the_installation(cloud):
    ended = cloud(tpu=["READY", "PREEMPTED", "PREEMPTED", "NONE", "READY"], ssh=[0, 255])
    assert ended.code == 0
    assert ended.verbs("describe") == [*START[:3], "delete", "create", *START]


def test_a_run_is_followed_again_after_a_lost_connection(cloud):
    ended = cloud(tpu=["READY"] * 3, codes=[255, 0])
    assert ended.code == 0 and ended.verbs("describe") == [*START, "start"]
    first, second = (call for call in ended.calls if "--here=" in call)
    assert first == second


def test_a_failed_command_is_started_again(cloud):
    ended = cloud(tpu=["READY"] * 3, codes=[1, 0])
    assert ended.code == 0 and ended.verbs("describe") == [*START, "ssh stop", "start"]
    first, second = (call for call in ended.calls if "--here=" in call)
    assert first != second


def test_a_users_mistake_is_not_retried(cloud):
    ended = cloud(tpu=["READY"] * 2, codes=[2])
    assert ended.code == 2 and ended.verbs("describe") == START
    assert "error: the command ended with exit code 2" in ended.err
    assert cloud("--delete", tpu=["READY"] * 2, codes=[2]).verbs()[-1] == "delete"


def test_limits_for_quick_and_slow_failures(cloud):
    ended = cloud(tpu=["READY"] * 9, codes=[1, 1, 134])
    assert ended.code == 134 and ended.verbs().count("start") == 3
    assert "error: exit code 134 on a TPU that is up, failure 3" in ended.err
    ended = cloud(tpu=["READY"] * 9, codes=[1, 1, 1, 1, 0], LAUNCH_TPU_QUICK="0")
    assert ended.code == 0 and ended.verbs().count("start") == 5
    assert cloud(tpu=["READY"] * 99, codes=[1] * 99, LAUNCH_TPU_QUICK="0").verbs().count("start") == 10


def test_files_and_variables_that_workers_get(cloud):
    extra = SCRIPT.parent / "runs" / "of_the_launch_test.txt"
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("mine")
    try:
        ended = cloud("--with=runs/of_the_launch_test.txt", "--env=SECRET", tpu=["READY"], SECRET="a b")
    finally:
        extra.unlink()
    assert ended.code == 0 and "a b" not in ended.out + ended.err
    with tarfile.open(ended.folder / "archive") as archive:
        names = archive.getnames()
        assert {"launch_tpu.sh", "camopd_jax/train.py", "runs/of_the_launch_test.txt"} <= set(names)
        assert archive.extractfile("launch.env").read() == b"export SECRET=a\\ b\n"
        assert archive.getmember("launch.env").mode & 0o077 == 0


# ------------------------------------------------------------------------------------ on a worker


@pytest.fixture
def worker(tmp_path):
    """worker(program) makes a worker with this program as python; worker.start(attempt) runs what ssh would run."""

    class Worker:
        home = tmp_path

        def __call__(self, program):
            python = tmp_path / "camopd_jax" / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text(f"#!/usr/bin/env bash\necho started >> starts\n{program}\n")
            python.chmod(stat.S_IRWXU)
            shutil.copy(SCRIPT, tmp_path / "camopd_jax")
            return self

        def start(self, attempt):
            command = f"cd camopd_jax && bash launch_tpu.sh --here={attempt} --module=m -- '--a=b c'"
            return subprocess.Popen(
                ["bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
            )

        def starts(self):
            return (tmp_path / "camopd_jax" / "starts").read_text().count("started")

    return Worker()


def test_a_worker_runs_the_command_once_per_attempt(worker):
    worker('echo "$@" $CAMOPD_DISTRIBUTED $TOKEN; exit 7')
    (worker.home / "camopd_jax" / "launch.env").write_text("export TOKEN=secret\n")
    for attempt, starts in ((1, 1), (1, 1), (2, 2)):
        process = worker.start(attempt)
        assert process.communicate(timeout=20)[0] == "-m m --a=b c 1 secret\n"
        assert process.returncode == 7 and worker.starts() == starts


def test_a_run_survives_a_lost_connection(worker):
    worker("mkfifo gate; echo ready; read < gate; echo done; exit 3")
    lost = worker.start(1)
    assert lost.stdout.readline() == "ready\n"
    os.killpg(lost.pid, signal.SIGKILL)
    lost.wait()
    again = worker.start(1)
    assert again.stdout.readline() == "ready\n"
    (worker.home / "camopd_jax" / "gate").write_text("\n")
    assert again.communicate(timeout=20)[0] == "done\n" and again.returncode == 3 and worker.starts() == 1


def test_a_stopped_run_is_not_taken_for_a_finished_one(worker):
    """Before every start, a command ends a program that still runs; like ours, it saves and exits with 0."""
    worker("trap 'echo saved; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    run = worker.start(1)
    assert run.stdout.readline() == "ready\n"
    printed = commands(dry(*FLAGS, "--dry-run", *RUN).stdout)
    stop = next(c[-1] for c in printed if c[4:5] == ["ssh"]).removeprefix("--command=")
    ended = subprocess.run(["bash", "-c", stop], cwd=worker.home, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0 and ended.stdout == "a run goes on here: asked to save and end\n"
    assert run.communicate(timeout=20)[0].endswith("saved\n") and run.returncode == 143
    ended = subprocess.run(["bash", "-c", stop], cwd=worker.home, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0 and ended.stdout == ""


def test_the_first_stop_on_a_fresh_worker_finds_nothing(tmp_path):
    printed = commands(dry(*FLAGS, "--dry-run", *RUN).stdout)
    stop = next(c[-1] for c in printed if c[4:5] == ["ssh"]).removeprefix("--command=")
    assert subprocess.run(["bash", "-c", stop], cwd=tmp_path, timeout=20).returncode == 0
