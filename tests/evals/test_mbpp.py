"""Code runs in a separate process: it may hang, use much memory, exit early or use the network without effect."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camopd_jax.evals.graders import mbpp

ROW = {"test_list": ["assert double(2) == 4", "assert double(-1) == -2"]}


@pytest.mark.parametrize(
    "answer, score, marked",
    [
        ("Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", 1, True),
        ("```py\ndef one(): return 1\n```\nand\n```\ndef double(x): return x + x * one()\n```", 1, True),
        ("```python\ndef double(x):\n    return x * x\n```", 0, True),
        ("```python\ndef double(x:\n```", 0, True),
        ("```python\nimport sys\nsys.exit(0)\n```", 0, True),
        ("```python\nimport os\nos._exit(0)\n```", 0, True),
        ("def double(x): return 2 * x", 0, False),
        ("```python\ndef double(x): return 2", 0, False),
        ("", 0, False),
    ],
)
def test_an_answer_is_right_if_its_code_passes_every_test(answer, score, marked):
    grade = mbpp.grade(answer, ROW)
    assert (grade.value, grade.marked) == (score, marked)


def test_setup_code_runs_first():
    row = {
        "test_setup_code": "BASE = 3",
        "test_imports": ["import math"],
        "test_list": ["assert f() == math.pi + BASE"],
    }
    assert mbpp.grade("```python\ndef f():\n    return math.pi + BASE\n```", row).value == 1


def command_lines():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield file.read_text()


def test_a_hanging_program_is_ended_with_its_children():
    mark = f"time.sleep(4{time.time_ns() % 10**9})"
    program = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; {mark}'])\nwhile True: pass"
    )
    started = time.monotonic()
    assert not mbpp.passes(program, seconds=2)
    assert time.monotonic() - started < 8
    until = time.monotonic() + 5  # the kernel ends a killed process when it comes to it
    while any(mark in line for line in command_lines()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_memory_and_files_have_limits():
    assert mbpp.passes("x = bytearray(2**20)")
    assert not mbpp.passes("x = bytearray(2**30)", memory=2**28)
    assert not mbpp.passes("open('big', 'wb').write(bytes(2**22))")


def test_programs_have_no_environment_and_no_input(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert mbpp.passes("import os, sys\nassert 'OPENAI_API_KEY' not in os.environ and sys.stdin.read() == ''")
    assert mbpp.passes("import os\nassert os.listdir('.') == []")


def has_network_namespaces():
    probe = "import ctypes; raise SystemExit(ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) != 0)"
    return subprocess.run([sys.executable, "-c", probe]).returncode == 0


@pytest.mark.skipif(not has_network_namespaces(), reason="this kernel lets no user leave the network")
def test_programs_have_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert not mbpp.passes(reach)
    assert mbpp.passes("import socket\nsocket.socket()")
