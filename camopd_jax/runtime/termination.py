"""How a process ends: alone as Python does, as a member of a cluster at once and with its reason on stderr.

A process of several cannot leave by an exception: others may wait for it in a collective, and JAX aborts those that are
left. `cluster.join` makes this process a member. Nothing here needs JAX.
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
    3  # seconds that process 0 stays, so that the others can print why they end: JAX aborts them when it goes
)
START_AGAIN = "Give the same command again on every host: a run continues from its last checkpoint"
# Parts of the messages of collectives whose other side has gone.
LOST_PROCESS_MESSAGES = ("Gloo", "NCCL", "coordination service", "heartbeat")


class ExitMessage:
    """A line on stderr after this process has gone, however it ends; none if the line is empty.

    When another process is lost, JAX aborts this one from a thread that runs no Python, so that nothing in this process
    can print a reason. (jaxlib takes a `missed_heartbeat_callback`, but `jax.distributed.initialize` does not, and with
    jaxlib 0.10 the callback itself aborts with std::bad_cast: an absl::Status has no Python type.) A shell outlives the
    process instead: it reads lines until the pipe between them is closed, which the system does at the latest, and
    prints the last.
    """

    def __init__(self) -> None:
        script = 'message=$(tail -n 1); [ -z "$message" ] || printf "%s\\n" "$message" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # signals of the terminal are not for it
        )

    def set(self, line: str) -> None:
        pipe = self._shell.stdin
        assert pipe is not None  # as asked for above
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
    """Makes this process a member of a cluster, which it leaves by `leave_cluster` or `terminate`."""
    global _membership
    _membership = _Membership(message, leads)


def leave_cluster() -> None:
    """Takes the exit message back: this process ends as it should."""
    global _membership
    if _membership:
        _membership.message.clear()
        _membership = None


def in_cluster() -> bool:
    """Whether this process is a member of a cluster."""
    return _membership is not None


def means_lost_process(error: BaseException) -> bool:
    """Whether an error comes of another process that is gone, and not of what this one did."""
    return in_cluster() and any(part in str(error) for part in LOST_PROCESS_MESSAGES)


def terminate(code: int, error: BaseException | None = None) -> NoReturn:
    """Ends this process with an exit code; in a cluster at once, without waiting for the other processes.

    Args:
      error: an unexpected one, to be printed first; None if its reason is on stderr already.
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
        sys.stdout.write("\x1b[?25h")  # shows the cursor, which a live display has no time to give back
    sys.stdout.flush()
    sys.stderr.flush()
    if _membership.leads:
        time.sleep(LEADER_DELAY)
    _membership.message.clear()
    os._exit(code)
