"""Runs scripts on a terminal."""

import contextlib
import os
import pty
import subprocess
import sys
import textwrap


def on_a_terminal(script):
    """The output of a script on a terminal of 120 columns."""
    terminal, end = pty.openpty()
    size = {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=end, stderr=end, env=os.environ | size
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal whose other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    assert child.wait() == 0, shown
    return shown.decode()
