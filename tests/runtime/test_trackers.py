"""Experiment trackers without a network: what a run logs is read back from the files that each library wrote."""

import json
import math
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from etils import epath

from camopd_jax.errors import UserError
from camopd_jax.runtime import trackers
from camopd_jax.runtime.metrics import MetricsWriter

ROW = {"step": 3, "phase": "recovery", "loss": 0.5, "entropy": math.nan, "seconds": {"rollout": 1.25}}
EVALUATION = {"step": 4, "model": "student", "benchmark": "sums"}
LOGGED = {("recovery/loss", 3): 0.5, ("recovery/seconds/rollout", 3): 1.25, ("accuracy/student/sums", 4): 0.75}
AGAIN = {("recovery/loss", 3): 0.5, ("recovery/loss", 5): 0.125}  # after a resume, which repeats step 3


class Memory:
    """A tracker in memory that can fail."""

    address = "memory"

    def __init__(self, fails=False):
        self.figures, self.files, self.closed, self.fails = {}, [], False, fails

    def log(self, figures, step):
        if self.fails:
            raise OSError("no route\nto host")
        self.figures |= {(name, step): value for name, value in figures.items()}

    def add_file(self, file):
        self.files.append(file.name)

    def close(self):
        self.closed = True


def write(writer, report):
    writer.add_step(ROW)
    writer.add_evaluation(EVALUATION, "accuracy", 0.75)
    writer.add_report(report)
    writer.close()


@pytest.fixture
def report(tmp_path):
    file = tmp_path / "report.html"
    file.write_text("<p>report</p>")
    return file


def test_names_are_those_of_the_files_and_a_tracker_that_fails_is_left_out(tmp_path, report):
    lines, good, bad = [], Memory(), Memory(fails=True)
    writer = MetricsWriter(epath.Path(tmp_path), trackers.Trackers({"bad": bad, "good": good}, lines.append))
    write(writer, report)
    assert good.figures == LOGGED and good.files == ["report.html"] and good.closed and not bad.files
    assert lines == ["warning: bad gets no more figures, they are in metrics.jsonl: no route to host"]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(UserError, match=r"'wandb', but the package no_such_.* pip install 'camopd_jax\[wandb\]'"):
        trackers.check(["tensorboard", "wandb"])
    trackers.check(["tensorboard"])
    with pytest.raises(UserError, match="give each tracker once"):
        trackers.check(["tensorboard", "tensorboard"])


def test_a_tracker_that_cannot_be_opened_is_one_line_and_closes_the_others(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("api_key not configured\nrun wandb login")

    first = Memory()
    monkeypatch.setitem(trackers._OPEN, "tensorboard", lambda *_: first)
    monkeypatch.setitem(trackers._OPEN, "wandb", fails)
    with pytest.raises(UserError, match=r"wandb cannot be opened \(api_key .* login\); set WANDB_API_KEY") as caught:
        trackers.open_trackers(["tensorboard", "wandb"], epath.Path(tmp_path), {}, print)
    assert "\n" not in str(caught.value) and first.closed


def leveldb_records(data):
    """The records of a LevelDB log behind a header of 7 bytes: 32 KiB blocks of parts (checksum, size, type, bytes)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            yield record
            record = b""


def wandb_rows(workdir):
    from wandb.proto import wandb_internal_pb2

    figures, ids, files = {}, set(), set()
    for file in workdir.glob("wandb/offline-run-*/*.wandb"):
        for record in map(wandb_internal_pb2.Record.FromString, leveldb_records(file.read_bytes())):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
            elif kind == "history":
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                figures |= {(name, row["step"]): v for name, v in row.items() if name != "step" and name[0] != "_"}
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                files |= {entry.path for entry in record.request.log_artifact.artifact.manifest.contents}
            elif kind == "artifact":
                files |= {entry.path for entry in record.artifact.manifest.contents}
    return figures, ids, files


def mlflow_rows(workdir):
    root = workdir / "mlruns"
    figures = {}
    runs = [file.parent for file in root.glob("*/*/meta.yaml")]
    for run in runs:
        for file in (run / "metrics").rglob("*"):
            if file.is_file():
                for line in file.read_text().splitlines():
                    _, value, step = line.split()
                    figures[file.relative_to(run / "metrics").as_posix(), int(step)] = float(value)
    files = {file.name for run in runs for file in (run / "artifacts").iterdir()} - {"config.json"}
    return figures, {run.name for run in runs}, files


def trackio_rows(workdir):
    (file,) = (workdir / "trackio").glob("*.db")
    with sqlite3.connect(file) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    figures = {(name, step): value for _, step, text in rows for name, value in json.loads(text).items()}
    files = {"report.html" for found in (workdir / "trackio").rglob("*") if found.is_file() and b"<p>report</p>" in
             found.read_bytes()[:99]}  # fmt: skip
    return figures, {run for run, *_ in rows}, files


READERS = {"wandb": wandb_rows, "mlflow": mlflow_rows, "trackio": trackio_rows}
SCRIPT = """
    import sys
    from pathlib import Path
    from etils import epath
    from camopd_jax.runtime import trackers
    from camopd_jax.runtime.metrics import MetricsWriter
    sys.path.insert(0, {tests!r})
    from test_trackers import ROW, write
    name, workdir = {name!r}, epath.Path({workdir!r})
    opened = trackers.open_trackers([name], workdir, {{"steps": 7}}, print)
    write(MetricsWriter(workdir, opened), Path({report!r}))
    opened = trackers.open_trackers([name], workdir, {{"steps": 7}}, print)  # as after a resume
    opened.log({{"recovery/loss": 0.5}}, 3)
    opened.log({{"recovery/loss": 0.125}}, 5)
    opened.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_offline_every_library_stores_the_same_figures_and_a_resumed_run_goes_on(name, tmp_path, report):
    pytest.importorskip(name)
    workdir = tmp_path / "run"
    workdir.mkdir()
    values = {"tests": str(Path(__file__).parent), "name": name, "workdir": str(workdir), "report": str(report)}
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(workdir / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    script = textwrap.dedent(SCRIPT).format(**values)
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0 and "warning:" not in ended.stdout, ended.stdout + ended.stderr
    figures, runs, files = READERS[name](workdir)
    assert figures == LOGGED | AGAIN and len(runs) == 1 and files == {"report.html"}
    assert json.loads((workdir / "trackers.json").read_text()).keys() == {name}


@pytest.mark.slow
def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"wandb cannot be opened \(.*; set WANDB_API_KEY, or WANDB_MODE=offline"):
        trackers.open_trackers(["wandb"], epath.Path(tmp_path), {}, print)
    assert not (tmp_path / "trackers.json").exists()
