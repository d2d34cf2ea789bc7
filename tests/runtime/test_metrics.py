"""Progress output with and without a terminal, and files that survive a kill."""

import json
import re

import pytest
from etils import epath
from tensorboardX.proto import event_pb2
from terminal import on_a_terminal

from camopd_jax.errors import UserError
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.jsonl import append_rows, drop_rows_after, read_rows, write_rows
from camopd_jax.runtime.memory import memory_gib
from camopd_jax.runtime.metrics import MetricsWriter
from camopd_jax.runtime.timing import Stages
from camopd_jax.runtime.trackers import open_trackers

ROW = {"step": 3, "phase": "recovery", "loss": 0.5, "gap_mean": -0.25, "gap_abs_mean": 0.75, "selected_fraction": 0.4,
       "length_mean": 12.0, "skipped": 0, "tokens_per_second": 1234.5, "seconds": {"rollout": 1.0}}  # fmt: skip


def test_stages_add_up():
    stages = Stages()
    for name in ("a", "b", "a"):
        with stages(name):
            pass
    seconds = stages.finish()
    assert set(seconds) == {"a", "b"} and all(s >= 0 for s in seconds.values())
    assert stages.finish() == {}, "the next step's"


def test_memory_of_the_process_if_the_device_reports_none():
    assert 0.05 < memory_gib() < 100


def test_rows_are_written_with_null_for_numbers_that_are_not_finite(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.add_step(ROW | {"loss": float("nan"), "seconds": {"rollout": float("inf")}})
    writer.add_step(ROW)
    writer.add_samples([{"step": 3, "response": "é"}])
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] is None and first["seconds"]["rollout"] is None and second == ROW
    assert json.loads((tmp_path / "samples.jsonl").read_text())["response"] == "é"


def test_a_damaged_line_takes_no_other_with_it(tmp_path):
    file = epath.Path(tmp_path / "rows.jsonl")
    append_rows(file, [{"text": "a\u2028b\x85c"}, {"text": "é"}])
    file.write_bytes(file.read_bytes()[:-3])  # cut inside the last character
    append_rows(file, [{"step": 1}])
    file.write_bytes(file.read_bytes() + b"\x00\xff\n[1]\n" + b'{"step": 2}\n{"step"')
    append_rows(file, [{"step": 3}])
    assert read_rows(file) == [{"text": "a\u2028b\x85c"}, {"step": 1}, {"step": 2}, {"step": 3}]


def scalars(folder):
    """{tag: value} of the event file, whose records are a length, its checksum, the bytes, their checksum."""
    (file,) = folder.glob("events.*")
    data, values = file.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        values |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
        data = data[16 + size :]
    return values


def test_tensorboard_has_the_numbers_under_their_phase(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), open_trackers(["tensorboard"], epath.Path(tmp_path), {}, print))
    writer.add_step(ROW | {"entropy": float("nan")})
    writer.add_evaluation({"step": 4, "model": "student", "benchmark": "sums"}, "accuracy", 0.5)
    writer.close()
    values = scalars(tmp_path / "tensorboard")
    assert values["recovery/loss"] == (3, 0.5) and values["recovery/seconds/rollout"] == (3, 1.0)
    assert values["accuracy/student/sums"] == (4, 0.5) and "recovery/entropy" not in values


def test_a_full_disk_is_one_line(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path))
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write .*start the same command again"):
        writer.add_step(ROW)


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("camopd_jax.runtime.display.STEP_SECONDS", 0.0)
    display = Display(total=10, start=0)
    display.step(ROW)
    display.step(ROW | {"step": 9, "skipped": 1})
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 4/10 recovery loss 0.5000 · gap -0.2500 · |gap| 0.7500 · kept 40 % · length 12 ")
    assert "1234 tok/s" in first and first.endswith("left") and "SKIPPED: not finite" in last and "\x1b" not in first


def test_plain_lines_are_few(capsys, monkeypatch):
    monkeypatch.setattr("camopd_jax.runtime.display.STEP_SECONDS", 1000.0)
    display = Display(total=10, start=0)
    for step in range(10):
        display.step(ROW | {"step": step})
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/10", "10/10"]


def test_on_a_terminal_the_display_is_live():
    text = on_a_terminal(f"""
        from camopd_jax.runtime.display import Display
        display = Display(total=10, start=0)
        display.step({ROW!r})
        display.print("a line above")
        display.close()
    """)
    assert all(part in text for part in ("\x1b[", "recovery", "4/10", "gap -0.2500", "a line above"))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


def test_colours_of_phases():
    text = on_a_terminal(f"""
        from camopd_jax.runtime.display import COLOURS, Display
        display = Display(total=10, start=0)
        for number in (*range(len(COLOURS) + 1), 0):
            display.step({ROW!r} | {{"phase": f"branch {{number}}"}})
            display.print("drawn")
        display.close()
    """)
    colours = set(re.findall(r"\x1b\[(3\d)m(branch \d)", text))
    assert colours == {(code, f"branch {i}") for i, code in enumerate(("36", "35", "32", "34", "33", "31", "36"))}


def test_an_incomplete_last_row_is_not_read(tmp_path):
    path = epath.Path(tmp_path) / "rows.jsonl"
    write_rows(path, [{"step": i} for i in range(4)])
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]
    drop_rows_after(path, 2)
    assert [row["step"] for row in read_rows(path)] == [0, 1] and not (tmp_path / "rows.jsonl.part").exists()
    assert read_rows(epath.Path(tmp_path) / "none.jsonl") == []


def test_an_incomplete_evaluation_row_is_removed(tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "model": "a"}\n{"step": 0, "mo')
    writer = MetricsWriter(epath.Path(tmp_path))
    for _ in range(2):  # the same row again, as after a kill, is not written twice
        writer.add_evaluation({"step": 1}, "accuracy", 0.5)
    assert [r["step"] for r in read_rows(epath.Path(tmp_path) / "eval.jsonl")] == [0, 1]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        write_rows(tmp_path / "no" / "rows.jsonl", [{}])
