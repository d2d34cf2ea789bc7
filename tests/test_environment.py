"""`train` in unusual environments: the same model, or one line that says what to do and nothing lost."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import QUICKLY_COMPILED
from quickstart import PAPER_CONFIG
from rows import read_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STEPS = 6
SMALL = [
    PAPER_CONFIG,
    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8",
    "--config.checkpoints.every=2", "--config.checkpoints.keep_last=9", "--config.evaluation.benchmarks=()",
    "--config.optimizer.schedule=constant",  # a run may then go on for more steps
]  # fmt: skip
# Root may write everywhere unless it gives this right up
NO_OVERRIDE = "-dac_override,-dac_read_search"
ORDINARY = ["setpriv", "--bounding-set", NO_OVERRIDE, "--inh-caps", NO_OVERRIDE] if os.geteuid() == 0 else []
CLOCK_SET_BACK = "import time\nreal = time.time\ntime.time = lambda: real() - 400 * 24 * 3600\n"

needs_rights = pytest.mark.skipif(bool(ORDINARY) and not shutil.which("setpriv"), reason="root without setpriv")


def start(workdir, *flags, steps=STEPS, env=(), root=ROOT, **options):
    """`python -m camopd_jax.train` of a checkout in a new interpreter, without the rights of root."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICKLY_COMPILED,
        "XDG_CACHE_HOME": str(workdir.parent / "cache"),
    } | dict(env)
    small = [flag.replace(str(ROOT), str(root)) for flag in SMALL]
    call = [*ORDINARY, sys.executable, "-m", "camopd_jax.train", *small, f"--config.steps={steps}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*call, f"--workdir={workdir}"], env=environment, text=True, **pipes, **options)


def wait_for(path):
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.002)


def model(workdir):
    return (workdir / "export/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The work directory of a run in the usual environment."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    run = start(workdir)
    out, _ = run.communicate(timeout=240)
    assert run.returncode == 0, out
    return workdir


@needs_rights
def test_locale_home_cache_and_file_descriptors(plain, tmp_path):
    """ASCII locale, no home, a cache that cannot be written, 64 files at a time, a name with spaces and accents."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    env = {"LC_ALL": "C", "PYTHONHASHSEED": "1", "HOME": "/proc/none", "XDG_CACHE_HOME": str(cache)}
    workdir = tmp_path / "Läufe 日本 1"
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))}
    run = start(workdir, env=env, **few)
    out, _ = run.communicate(timeout=240)
    assert run.returncode == 0 and "Traceback" not in out, out
    assert model(workdir) == model(plain)


@needs_rights
def test_a_checkout_that_cannot_be_written(plain, tmp_path):
    root = tmp_path / "checkout"
    for name in ("camopd_jax", "configs", "examples"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = [root, *root.rglob("*")]
    for file in files:
        file.chmod(file.stat().st_mode & ~0o222)
    workdir = tmp_path / "run"
    out, _ = (run := start(workdir, root=root, cwd=root)).communicate(timeout=240)
    assert run.returncode == 0 and "Traceback" not in out, out
    assert model(workdir) == model(plain)
    assert sorted([root, *root.rglob("*")]) == sorted(files), "nothing is added"
    for folder in filter(Path.is_dir, files):  # pytest deletes them later
        folder.chmod(0o755)


@needs_rights
def test_a_workdir_made_read_only_midway(plain, tmp_path):
    workdir = tmp_path / "run"
    run = start(workdir, steps=400)
    wait_for(workdir / "checkpoints/2")
    files = [workdir, *workdir.rglob("*")]
    for file in files:
        file.chmod(file.stat().st_mode & ~0o222)
    out, _ = run.communicate(timeout=120)
    *_, last = out.strip().splitlines()
    assert run.returncode == 2 and last.startswith(f"error: {workdir}") and "writ" in last, out
    assert "Traceback" not in out
    for file in files:
        file.chmod(file.stat().st_mode | 0o200)
    again = start(workdir)
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0, out
    assert model(workdir) == model(plain)
    assert [row["step"] for row in read_lines(workdir / "metrics.jsonl")] == list(range(STEPS))


@pytest.mark.parametrize("moment", ["checkpoints/2.orbax-checkpoint-tmp", "export.part"])
def test_sigterm_while_files_are_written_and_a_clock_set_back(plain, tmp_path, moment):
    workdir = tmp_path / "run"
    run = start(workdir)
    wait_for(workdir / moment)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=240)
    assert run.returncode == 0 and "Traceback" not in out, out
    (tmp_path / "sitecustomize.py").write_text(CLOCK_SET_BACK)
    again = start(workdir, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0, out
    assert model(workdir) == model(plain)
    assert [row["step"] for row in read_lines(workdir / "metrics.jsonl")] == list(range(STEPS))
