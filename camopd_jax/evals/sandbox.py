"""Runs Python that a model wrote: with limits, and apart from the machine as far as the kernel lets this user.

Always: limits on time, memory, processes and the size of a file; a folder and an environment of its own, no standard
input; all that a program started ends with it. Where the kernel allows namespaces: no network, no other process in
sight, and every file outside the folder read-only. For root: as another user, that owns nothing, where that user can
read Python's own files. `protections` tries out what holds on this machine.

What it does not protect against: a program reads what its user may read, and talks to services through sockets in the
file system. Its tests run in the same interpreter, so one that is written to cheat can pass them with a wrong answer:
by what stands in the tests, with an object that equals everything, or by asking for the proof in the interpreter's
place. What `protections` says it is not kept from is open to it: with other processes in reach it can also end the one
that supervises it, and outlive its time. A flaw of the kernel opens everything. Run a model that you do not trust in a
virtual machine of its own.
"""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile

from camopd_jax.errors import UserError
from camopd_jax.evals import supervisor

SECONDS = 10.0
MEMORY = 2**30  # bytes of address space of each process, and of memory of all together
WAYS = (("user", "apart"), ("apart",), ())  # arguments of the supervisor, the best first

_HARMLESS = "import json, os, random\nopen('file', 'w').close()\nos.remove('file')"
_ATTACKS = {  # each raises an OSError in a program that is kept from it
    "the network": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "this user's files": "open({file!r}, 'a')",
    "files that all may write": "open({file!r} + '.new', 'x')",
    "other processes": "import os; os.kill({process}, 0)",
    f"more than {supervisor.TASKS} processes": "import os, time; [os.fork() or time.sleep(9) for _ in range({tasks})]",
}


def passes(program: str, *, seconds: float = SECONDS, memory: int = MEMORY, way: tuple[str, ...] | None = None) -> bool:
    """Whether a program comes to its end within the limits, without an error.

    Args:
      seconds: of wall clock. memory: in bytes.
      way: one of WAYS. None: the best that works on this machine.

    Raises:
      UserError: if no way works.
    """
    command = [sys.executable, "-I", "-S", supervisor.__file__, str(seconds), str(memory)]
    command += best_way() if way is None else way
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as source:
        source.write(program.encode("utf-8", "replace"))
        source.seek(0)
        null = subprocess.DEVNULL
        child = subprocess.Popen(
            command, stdin=source, stdout=null, stderr=null, cwd=folder, env={}, start_new_session=True
        )
        try:
            return child.wait(seconds + 30) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@functools.cache
def best_way() -> tuple[str, ...]:
    """The first of WAYS in which a harmless program passes.

    Raises:
      UserError: if there is none.
    """
    for way in WAYS[os.getuid() != 0 :]:
        if passes(_HARMLESS, way=way):
            return way
    raise UserError(
        f"{sys.executable}: cannot run a program in a process of its own; check the limits that `ulimit -a` shows and "
        f"that {tempfile.gettempdir()} can be written"
    )


@functools.cache
def protections() -> str:
    """A line that says what programs are kept from on this machine, as found by trying.

    Raises:
      UserError: if no program can be run.
    """
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        tempfile.NamedTemporaryFile() as file,
        contextlib.suppress(FileNotFoundError),
    ):
        facts = {
            "port": server.getsockname()[1],
            "file": file.name,
            "process": os.getpid(),
            "tasks": supervisor.TASKS + 1,
        }
        tries = "try:\n    {}\nexcept OSError:\n    pass\nelse:\n    raise ValueError"
        held = {name: passes(tries.format(attack.format(**facts))) for name, attack in _ATTACKS.items()}
        os.remove(file.name + ".new")
    closed, opened = ([name for name in held if held[name] == is_held] for is_held in (True, False))
    line = "programs in answers run with limits on time, memory and file sizes"
    line += f" and are kept from: {', '.join(closed)}" if closed else ""
    return line + (f"; NOT kept from: {', '.join(opened)}" if opened else "")
