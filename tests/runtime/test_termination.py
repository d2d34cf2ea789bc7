"""Ending of a process: without JAX, and the exit message that is printed afterwards."""

import signal
import subprocess
import sys
import textwrap

import pytest


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)


def test_flags_and_errors_of_a_command_need_no_jax():
    ended = run("import sys, camopd_jax.runtime.cli; print('jax' in sys.modules)")
    assert ended.stdout == "False\n", ended.stderr


@pytest.mark.parametrize(
    "end, code, printed",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "last line\n"),
        ("os.abort()", -signal.SIGABRT, "last line\n"),
        ("message.clear()", 0, ""),
        ("termination.enter_cluster(message, leads=False); termination.terminate(5)", 5, ""),
        ("termination.terminate(5)", 5, "last line\n"),
    ],
    ids=["killed", "aborted", "cleared", "cluster", "alone"],
)
def test_the_exit_message_is_the_last_line_set(end, code, printed):
    ended = run(f"""
        import os, signal
        from camopd_jax.runtime import termination
        message = termination.ExitMessage()
        message.set("first line")
        message.set("last line")
        {end}
    """)
    assert (ended.returncode, ended.stderr) == (code, printed)


def test_a_lost_process_is_one_line_and_other_errors_have_a_traceback():
    ended = run("""
        from camopd_jax.runtime import termination
        termination.enter_cluster(termination.ExitMessage(), leads=False)
        termination.terminate(1, RuntimeError("Gloo all-reduce failed: connection closed by peer\\nmore"))
    """)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: another process of the run was lost (Gloo all-reduce failed: connection ")
    assert len(ended.stderr.splitlines()) == 1

    ended = run("""
        from camopd_jax.runtime import termination
        termination.enter_cluster(termination.ExitMessage(), leads=False)
        termination.terminate(1, ZeroDivisionError("of ours"))
    """)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1] == "ZeroDivisionError: of ours"
