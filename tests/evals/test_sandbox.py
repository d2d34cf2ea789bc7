"""Programs run apart: they may hang, multiply, forge their end or reach for files and network, and nothing happens."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camopd_jax.evals import sandbox, supervisor

WAYS = sandbox.WAYS[os.getuid() != 0 :]
every_way = pytest.mark.parametrize("way", WAYS, ids=" ".join)


def is_kept_from(attack):
    return attack in sandbox.protections().split("; NOT")[0]


# ------------------------------------------------------------------------------ what a program may do


@every_way
@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert '\u00e9' == chr(0xe9)",
        "import os, sys\nassert os.listdir('.') == [] and sys.stdin.read() == '' and 'HOME' not in os.environ",
        "open('a', 'w').write('x' * 2**19)\nassert open('a').read(1) == 'x'",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as file: file.write(b'x')",
        "x = bytearray(2**20)",
        "import subprocess, sys\nassert subprocess.run([sys.executable, '-c', '']).returncode == 0",
        "import os\nos.fork()",
        "import threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()",
    ],
)
def test_a_harmless_program_passes(way, program):
    assert sandbox.passes(program, way=way)


def test_several_processes_are_allowed():
    program = "import multiprocessing\nassert multiprocessing.Pool(2).map(abs, [-1, 2]) == [1, 2]"
    assert sandbox.passes(program)


def test_sets_have_the_same_order_every_time():
    seeded = subprocess.run(
        [sys.executable, "-c", "print(hash('a'))"], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    )
    assert sandbox.passes(f"assert hash('a') == {seeded.stdout}")


# --------------------------------------------------------------------------------------- forged ends


@every_way
@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "syntax error",
        "import os\nos._exit(0)",
        "import os\nos._exit(77)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos.kill(os.getppid(), 15)\nassert False",
        "import atexit, os\natexit.register(os._exit, 0)\nassert False",
        "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\nassert False",
        "import builtins\nbuiltins.AssertionError = builtins.exec = builtins.compile = print\nassert False",
        "import os\nos._exit = os.write = print\nassert False",
        "import os\nif os.fork():\n    os._exit(0)",
        # what might be taken for the mark of success, written everywhere
        "import os\nfor text in (b'?', b'0' * 16, b'ok'):\n    for fd in range(64):\n"
        "        try: os.write(fd, text)\n        except OSError: pass\nos._exit(0)",
        "import os\nprint('?', flush=True)\nos._exit(0)",
    ],
)
def test_a_program_that_does_not_come_to_its_end_fails(way, program):
    assert not sandbox.passes(program, way=way, seconds=5)


# Looks for the proof, of which it knows a hash: among all objects, in its caller's variables, in what the kernel tells.
HUNT = """
import gc, hashlib, os, sys
texts, frame = [], sys._getframe()
while frame:
    texts += [*frame.f_globals.values(), *frame.f_locals.values(), *frame.f_code.co_consts]
    frame = frame.f_back
for found in gc.get_objects():
    texts += gc.get_referents(found)
texts += [text.encode() for text in [*sys.argv, *sys.orig_argv, *os.environ.values()]]
for process in ("self", os.getppid()):
    for name in ("cmdline", "environ"):
        try: texts.append(open(f"/proc/{process}/{name}", "rb").read())
        except OSError: pass
def is_proof(text):
    return any(hashlib.sha256(text[i:i + 16]).hexdigest() == DIGEST for i in range(max(1, len(text) - 15)))
texts = {bytes(text) for text in texts if isinstance(text, (bytes, bytearray)) and len(text) < 4096}
assert not any(is_proof(text) for text in texts if len(text) >= 16)
""".replace("DIGEST", repr(hashlib.sha256(b"sixteen letters.").hexdigest()))


@pytest.mark.parametrize(
    "place, told",
    [
        (None, None),
        ('"TMPDIR"', '"PROOF": "sixteen letters.", "TMPDIR"'),
        ('"-c", PROGRAM', '"-X", "sixteen letters.", "-c", PROGRAM'),
        ("import os, sys\n", "import os, sys\nproof = [b'sixteen letters.']\n"),
    ],
    ids=["as it is", "environment", "arguments", "variables"],
)
@every_way
def test_the_proof_is_nowhere_to_be_found(way, place, told, tmp_path, monkeypatch):
    """A supervisor that draws a known number; if it told it to the program by any of these ways, that would find it."""
    text = Path(supervisor.__file__).read_text().replace("os.urandom(16)", 'b"sixteen letters."')
    script = tmp_path / "supervisor.py"
    script.write_text(text.replace(place, told) if place else text)
    monkeypatch.setattr(supervisor, "__file__", str(script))
    assert sandbox.passes("pass", way=way)
    assert sandbox.passes(HUNT, way=way, seconds=30) == (place is None)


def test_the_memory_of_the_supervisor_cannot_be_read():
    program = (
        "import os\nfor name in ('mem', 'environ'):\n    try: open(f'/proc/{os.getppid()}/{name}', 'rb').read(1)\n"
    )
    program += "    except PermissionError: continue\n    raise ValueError"
    assert sandbox.passes(program)


# ------------------------------------------------------------------------------- what outlives a program


def processes_with(mark):
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark in file.read_text():
                yield file


@every_way
@pytest.mark.parametrize("end", ["", "while True: pass", "assert False"])
def test_all_that_a_program_started_ends_with_it(way, end):
    """Also a process in a session of its own, whose parent has ended."""
    mark = f"time.sleep(4{time.time_ns() % 10**9})"
    daemon = f"""
import os, sys, time
read, write = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        os.set_inheritable(write, True)
        os.execv(sys.executable, [sys.executable, "-c", f"import os, time; os.write({{write}}, b'x'); {mark}"])
    os._exit(0)
assert os.read(read, 1) == b"x"
"""
    started = time.monotonic()
    assert sandbox.passes(daemon + end, way=way, seconds=3) == (end == "")
    assert time.monotonic() - started < 20
    until = time.monotonic() + 5  # the kernel ends a killed process when it comes to it
    while any(processes_with(mark)):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_file_that_a_child_would_write_later_is_not_written(tmp_path):
    tmp_path.chmod(0o777)
    late = tmp_path / "late"
    child = f"    os.setsid()\n    time.sleep(1)\n    open({str(late)!r}, 'w')\n    os._exit(0)"
    assert sandbox.passes(f"import os, time\nif not os.fork():\n{child}")
    time.sleep(1.5)
    assert not late.exists()


@every_way
def test_a_program_that_multiplies_is_ended(way):
    """Bounded by itself, should the limit not hold."""
    program = f"import os, time\nfor _ in range({supervisor.TASKS + 20}):\n    if not os.fork(): time.sleep(20)\n"
    started = time.monotonic()
    assert not sandbox.passes(program + "time.sleep(20)", way=way, seconds=10)
    assert time.monotonic() - started < 30


# --------------------------------------------------------------------------------- what it must not reach


def test_memory_and_files_have_limits():
    assert not sandbox.passes("x = bytearray(2**30)", memory=2**28)
    assert not sandbox.passes("open('big', 'wb').write(bytes(2**22))")
    several = (
        "import os, time\nfor _ in range(4):\n    if not os.fork(): x = b'x' * 2**26; time.sleep(9)\ntime.sleep(9)"
    )
    assert not sandbox.passes(several, memory=2**27)


def test_files_outside_its_folder_are_read_only(tmp_path):
    if not is_kept_from("files that all may write"):
        pytest.skip("this kernel lets no user make mounts read-only")
    tmp_path.chmod(0o777)
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o666)
    attacks = [
        f"open({str(file)!r}, 'w')",
        f"os.remove({str(file)!r})",
        f"os.chmod({str(file)!r}, 0)",
        f"os.rename({str(file)!r}, 'mine')",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        "open('/proc/sys/kernel/hostname', 'w')",
    ]
    for attack in attacks:
        assert not sandbox.passes(f"import os\n{attack}"), attack
    remount = "import ctypes\nassert ctypes.CDLL(None).mount(None, b'/', None, 0x1020, None) == 0"  # bind, remount
    assert not sandbox.passes(remount)
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]
    full = "for i in range(100): open(str(i), 'wb').write(bytes(2**20))"
    assert sandbox.passes(full.replace("100", "30")) and not sandbox.passes(full)


def test_it_has_no_network():
    if not is_kept_from("the network"):
        pytest.skip("this kernel lets no user leave the network")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert not sandbox.passes(reach)
    assert sandbox.passes("import socket\nsocket.socket()")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_roots_programs_are_another_users(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    if sandbox.best_way() == WAYS[0]:
        assert not sandbox.passes(f"open({str(secret)!r})")


# --------------------------------------------------------------------------------------- what is told


def test_a_line_tells_which_protections_hold(monkeypatch):
    told = []
    sandbox.protections.cache_clear()
    monkeypatch.setattr(sandbox, "passes", lambda program: not told.append(program) and "socket" not in program)
    line = sandbox.protections()
    sandbox.protections.cache_clear()
    assert len(told) == 5
    assert re.search(r"are kept from: this user's files, .*, other processes, .*; NOT kept from: the network$", line)
