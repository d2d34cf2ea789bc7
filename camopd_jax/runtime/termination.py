"""Ends a process: a single process normally, a member of a cluster at once, with the reason on stderr.

A member of a cluster cannot end with an exception: other processes may wait for it in a collective, and JAX aborts the
remaining processes. `cluster.join` makes this process a member. This module does not need JAX.
"""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from typing import NoReturn

LEADER_DELAY = (
    3  # seconds that process 0 waits, so that the others can print why they end: JAX aborts them when it ends
)
START_AGAIN = "Give the same command again on every host: a run continues from its last checkpoint"
# Texts in the error messages of collectives when another process has ended.
LOST_PROCESS_MESSAGES = ("Gloo", "NCCL", "coordination service", "heartbeat")


class ExitMessage:
    """A line that is printed to stderr after this process has ended in any way; nothing if the line is empty.

    When another process is lost, JAX aborts this one from a thread that runs no Python, so this process cannot print a
    reason. (jaxlib has a `missed_heartbeat_callback`, but `jax.distributed.initialize` does not pass it, and in jaxlib
    0.10 the callback itself aborts with std::bad_cast: an absl::Status has no Python type.) Therefore a separate shell
    reads lines from a pipe until the pipe is closed, at the latest when this process ends, and prints the last line.
    """

    def __init__(self) -> None:
        script = 'message=$(tail -n 1); [ -z "$message" ] || printf "%s\\n" "$message" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # the shell must not get the terminal's signals
        )

    def set(self, line: str) -> None:
        pipe = self._shell.stdin
        assert pipe is not None  # because stdin is a pipe
        with contextlib.suppress(OSError):  # the shell may have been killed
            pipe.write(f"{line}\n".encode())
            pipe.flush()

    def clear(self) -> None:
        self.set("")


@dataclass(frozen=True)
class _Membership:
    message: ExitMessage
    leads: bool  # whether this is process 0 of several


_membership: _Membership | None = None


def enter_cluster(message: ExitMessage, leads: bool) -> None:
    """Makes this process a member of a cluster until `leave_cluster` or `terminate`."""
    global _membership
    _membership = _Membership(message, leads)


def leave_cluster() -> None:
    """Clears the exit message, because this process ends normally."""
    global _membership
    if _membership:
        _membership.message.clear()
        _membership = None


def in_cluster() -> bool:
    """Whether this process is a member of a cluster."""
    return _membership is not None


def means_lost_process(error: BaseException) -> bool:
    """Whether the cause of an error is the loss of another process."""
    return in_cluster() and any(part in str(error) for part in LOST_PROCESS_MESSAGES)


def terminate(code: int, error: BaseException | None = None) -> NoReturn:
    """Ends this process with an exit code; in a cluster at once, without waiting for the other processes.

    Args:
      error: an unexpected error, which is printed first; None if the reason has been printed.
    """
    if error is not None and means_lost_process(error):
        print(
            f"error: another process of the run was lost ({str(error).splitlines()[0]}). {START_AGAIN}", file=sys.stderr
        )
    elif error is not None:
        traceback.print_exception(error)
    if _membership is None:
        sys.exit(code)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # shows the cursor, which a live display has hidden
    sys.stdout.flush()
    sys.stderr.flush()
    if _membership.leads:
        time.sleep(LEADER_DELAY)
    _membership.message.clear()
    os._exit(code)
