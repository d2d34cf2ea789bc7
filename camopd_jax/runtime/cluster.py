"""How the processes of a run, one a host with the same command, find each other; `termination` is how each ends."""

import atexit
import faulthandler
import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import jax

from camopd_jax.errors import UserError
from camopd_jax.runtime.distributed import is_distributed, is_primary
from camopd_jax.runtime.termination import START_AGAIN, ExitMessage, enter_cluster, leave_cluster

LOST_AFTER = 100  # seconds without a sign of life, after which a process is held to be dead
JOIN_WITHIN = 300  # seconds in which all processes have to be there
LEAVE_WITHIN = 300  # seconds that a process which is done waits for the others

KILLED = (
    "error: this process was killed, or ended by JAX because another process of the run is lost (the lines above tell "
    f"which). {START_AGAIN}"
)


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
    message = ExitMessage()
    try:
        if given and given.process_id == 0:
            _check_port(given)
        message.set(f"error: {_cannot_join(given)}" if given else KILLED)
        jax.distributed.initialize(**(vars(given) if given else {}), **times)
    except UserError:
        message.clear()
        raise
    except Exception as error:  # detection asks environments and servers of many kinds
        message.clear()
        if given is None and wish != "1" and "should be defined" in str(error):  # a TPU without a cluster around it
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if given:
            raise UserError(f"{_cannot_join(given)} ({reason})") from error
        raise UserError(
            f"the other processes cannot be found ({reason}); name them with --coordinator_address, --num_processes "
            "and --process_id, or run alone with CAMOPD_DISTRIBUTED=0 in the environment"
        ) from error
    message.set(KILLED)
    enter_cluster(message, leads=is_distributed() and is_primary())
    atexit.register(_leave)
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
    leave_cluster()


def _on_cloud_tpu() -> bool:
    """Whether JAX will run on the TPU chips of this host."""
    chips = any(any(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    wanted = (jax.config.jax_platforms or "tpu").split(",")
    return chips and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None
