"""MBPP: runs a Python function and its tests in a separate process.

The process has a time limit, a memory limit, an empty folder, no environment, no standard input and, if the kernel
allows it, no network. This prevents accidents but does not stop malicious code: evaluate a model that you do not trust
in a container.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile

from camopd_jax.errors import UserError
from camopd_jax.evals.task import Grade, Row, Task

SECONDS = 10.0
MEMORY = 2**30  # bytes of address space

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

# Code of the child process: sets the limits, leaves the network, runs the program, and exits with 77 after its end.
_CHILD = """
import ctypes, os, resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
except Exception:
    pass
for name, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", 2**20), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
program = sys.stdin.read()
exec(compile(program, "answer.py", "exec"), {"__name__": "__main__"})
os._exit(77)
"""
_ENDED = 77  # not 0, because an answer that calls exit(0) has not passed the tests


def code(answer: str) -> str | None:
    """The closed Python blocks of an answer, joined; None if it has none."""
    blocks = _BLOCK.findall(answer)
    return "\n".join(blocks) if blocks else None


def passes(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a program ends within the limits, without an error.

    Args:
      seconds: of wall-clock time. memory: bytes of address space.
    """
    arguments = [sys.executable, "-I", "-S", "-c", _CHILD, str(int(seconds) + 1), str(memory)]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            child.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(child)
    return child.returncode == _ENDED


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer's code passes all tests of the row's "test_list", else 0."""
    program = code(answer)
    if program is None:
        return Grade(0.0, marked=False)
    tests = [*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]]
    return Grade(float(passes("\n".join([program, *tests]))))


def _check_row(row: Row) -> None:
    for name in ("test_list", "test_imports"):
        lines = row.get(name, [])
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise UserError(f'"{name}" must be a list of lines of code, this is {lines!r:.80}')
    if not row["test_list"]:
        raise UserError('"test_list" is empty: every answer would pass')
    if not isinstance(row.get("test_setup_code", ""), str):
        raise UserError(f'"test_setup_code" must be text, this is {row["test_setup_code"]!r:.80}')


TASK = Task(
    grade,
    "Answer with one Python code block.",
    needs=("test_list",),
    check_row=_check_row,
    threads=4,
    dataset="google-research-datasets/mbpp:full",
)
