"""A run of several processes, one a host, that all run the same command: how they find each other, and how they end."""

import atexit
import contextlib
import faulthandler
import importlib.util
import os
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jax

from camopd_jax.errors import UserError
from camopd_jax.runtime.distributed import is_distributed, is_primary

LOST_AFTER = 100  # seconds without a sign of life, after which a process is held to be dead
JOIN_WITHIN = 300  # seconds in which all processes have to be there
LEAVE_WITHIN = 300  # seconds that a process which is done waits for the others
LAST_WORDS = 3  # seconds that process 0 leaves the others to tell why they end, as it does itself

AGAIN = "Give the same command again on every host: a run goes on from its last checkpoint"
ENDED = (
    "error: this process was killed, or ended by JAX because another process of the run is lost (the lines above tell "
    f"which). {AGAIN}"
)
SIGNS = ("Gloo", "NCCL", "coordination service", "heartbeat")  # in errors of collectives whose other side is gone


@dataclass(frozen=True)
class Processes:
    """Where the processes of a run meet: what the flags of that name say."""

    coordinator_address: str  # host:port of process 0, which all can reach
    num_processes: int
    process_id: int  # of this one, from 0

    def __post_init__(self):
        """Raises UserError for values that cannot be."""
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator_address={self.coordinator_address}: give process 0's host and a free port of it, as in "
                "--coordinator_address=10.0.0.1:8476"
            )
        if self.num_processes < 1:
            raise UserError(f"--num_processes={self.num_processes}: give a number > 0")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id}: give each of the {self.num_processes} processes a number of its own, "
                f"from 0 to {self.num_processes - 1}"
            )


def join(given: Processes | None) -> None:
    """Waits for the other processes of the run, where there are any. Comes before all else that asks JAX for devices.

    Args:
      given: where they meet. None: on Cloud TPU JAX finds them itself; with CAMOPD_DISTRIBUTED=1 in the environment it
        does so under SLURM, Open MPI and Kubernetes too, with CAMOPD_DISTRIBUTED=0 nowhere. Else this one is alone.

    Raises:
      UserError: if they cannot be found. Where they do not come in time, JAX aborts this process.
    """
    wish = os.environ.get("CAMOPD_DISTRIBUTED")
    if jax.distributed.is_initialized() or (given is None and wish != "1" and (wish == "0" or not _on_cloud_tpu())):
        return
    times = {
        "initialization_timeout": JOIN_WITHIN,
        "heartbeat_timeout_seconds": LOST_AFTER,
        "shutdown_timeout_seconds": LEAVE_WITHIN,
    }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # looked at where the devices are CPUs
    sentinel = _Sentinel()
    try:
        if given and given.process_id == 0:
            _check_port(given)
        sentinel.last_words(f"error: {_cannot_join(given)}" if given else ENDED)
        jax.distributed.initialize(**(vars(given) if given else {}), **times)
    except UserError:
        sentinel.last_words("")
        raise
    except Exception as error:  # detection asks environments and servers of many kinds
        sentinel.last_words("")
        if given is None and wish != "1" and "should be defined" in str(error):  # a TPU without a cluster around it
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if given:
            raise UserError(f"{_cannot_join(given)} ({reason})") from error
        raise UserError(
            f"the other processes cannot be found ({reason}); name them with --coordinator_address, --num_processes "
            "and --process_id, or run alone with CAMOPD_DISTRIBUTED=0 in the environment"
        ) from error
    global _sentinel
    _sentinel = sentinel
    atexit.register(_leave)
    sentinel.last_words(ENDED)
    sentinel.leads = is_distributed() and is_primary()
    faulthandler.disable()  # it would print the stacks of all threads between JAX's reason and ours


def _check_port(given: Processes) -> None:
    try:
        socket.create_server(("", int(given.coordinator_address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"--coordinator_address={given.coordinator_address}: process 0 cannot listen there "
            f"({os.strerror(error.errno)}); give a free port"
        ) from error


def _cannot_join(given: Processes) -> str:
    return (
        f"--coordinator_address={given.coordinator_address}: process {given.process_id} of {given.num_processes} "
        f"cannot join the others there; start all within {JOIN_WITHIN} seconds, each with a --process_id of its own "
        "and process 0 on that host"
    )


def _leave() -> None:
    jax.distributed.shutdown()
    _sentinel.last_words("")


def joined() -> bool:
    """Whether this process belongs to others, and has to end by `end` where it fails."""
    return _sentinel is not None


def lost(error: BaseException) -> bool:
    """Whether an error tells that another process is gone, and not of what this one did."""
    return joined() and any(sign in str(error) for sign in SIGNS)


def end(code: int, error: BaseException | None = None) -> NoReturn:
    """Ends this process of several now. The others are not waited for: they may wait for this one in a collective.

    Args:
      error: what no one expected; it is told on stderr. None: the reason is told already.
    """
    if error is not None and lost(error):
        print(f"error: another process of the run is lost ({str(error).splitlines()[0]}). {AGAIN}", file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a live display has no time to give the cursor back
    sys.stdout.flush()
    sys.stderr.flush()
    if _sentinel.leads:
        time.sleep(LAST_WORDS)  # JAX aborts the others as soon as process 0 is gone
    _sentinel.last_words("")
    os._exit(code)


class _Sentinel:
    """A shell that outlives this process and then says its last words: JAX aborts a process from a thread that runs no
    Python, when another one is lost.
    """

    def __init__(self):
        self.leads = True  # whether this is process 0 of several, as it may be
        script = 'words=; while IFS= read -r line; do words=$line; done; [ -z "$words" ] || printf "%s\n" "$words" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def last_words(self, words: str) -> None:
        with contextlib.suppress(OSError):  # it may have been killed
            self._shell.stdin.write(f"{words}\n".encode())
            self._shell.stdin.flush()


_sentinel: _Sentinel | None = None


def _on_cloud_tpu() -> bool:
    """Whether JAX will run on the TPU chips of this host."""
    chips = any(any(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    wanted = (jax.config.jax_platforms or "tpu").split(",")
    return chips and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None
