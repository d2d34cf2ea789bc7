"""Connects the processes of a run before JAX is used: one process per host, all with the same command.

`distributed` has the communication between them, and `termination` their ending.
"""

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

JOIN_TIMEOUT = 300  # seconds within which all processes must connect
HEARTBEAT_TIMEOUT = 100  # seconds without a heartbeat after which a process counts as lost
SHUTDOWN_TIMEOUT = 300  # seconds that a finished process waits for the others

KILLED = (
    "error: this process was killed, or JAX ended it because another process of the run was lost (see the lines above)"
    f". {START_AGAIN}"
)


@dataclass(frozen=True)
class Processes:
    """The values of the flags with these names."""

    coordinator_address: str  # host:port of process 0, reachable from all hosts
    num_processes: int
    process_id: int  # of this process, from 0

    def __post_init__(self) -> None:
        """Raises UserError for an invalid address or number."""
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator_address={self.coordinator_address}: give the host of process 0 and a free port on it, "
                "such as --coordinator_address=10.0.0.1:8476"
            )
        if self.num_processes < 1:
            raise UserError(f"--num_processes={self.num_processes}: give a number > 0")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id}: give each of the {self.num_processes} processes its own number from "
                f"0 to {self.num_processes - 1}"
            )

    @property
    def port(self) -> int:
        return int(self.coordinator_address.rpartition(":")[2])


def join(processes: Processes | None) -> None:
    """Connects to the other processes of the run, if there are any. Call it before JAX lists its devices.

    Args:
      processes: address, number and id. None: JAX detects them on Cloud TPU; with CAMOPD_DISTRIBUTED=1 in the
        environment also under SLURM, Open MPI and Kubernetes; with CAMOPD_DISTRIBUTED=0 never. If they are not
        detected, the run has only this process.

    Raises:
      UserError: if the other processes cannot be found. If they do not connect in time, JAX aborts this process.
    """
    if jax.distributed.is_initialized() or (processes is None and not _may_detect()):
        return
    message = ExitMessage()
    try:
        if processes is not None:
            _connect(processes, message)
        elif not _detect(message):
            message.clear()
            return
    except UserError:
        message.clear()
        raise
    message.set(KILLED)
    enter_cluster(message, leads=is_distributed() and is_primary())
    atexit.register(_leave)
    faulthandler.disable()  # it would print the stacks of all threads between JAX's reason and the exit message


def _connect(processes: Processes, message: ExitMessage) -> None:
    """Connects to the given address."""
    failed = (
        f"--coordinator_address={processes.coordinator_address}: process {processes.process_id} of "
        f"{processes.num_processes} cannot connect to the others; start all within {JOIN_TIMEOUT} seconds, each with "
        "its own --process_id, and process 0 on that host"
    )
    if processes.process_id == 0:
        _check_port(processes)
    message.set(f"error: {failed}")
    try:
        _initialize(processes)
    except Exception as error:  # JAX raises several kinds
        raise UserError(f"{failed} ({_first_line(error)})") from error


def _detect(message: ExitMessage) -> bool:
    """Lets JAX detect the other processes; returns False on a single TPU host."""
    message.set(KILLED)
    try:
        _initialize()
    except Exception as error:  # detection depends on the environment and raises many kinds
        if _distributed_setting() != "1" and "should be defined" in str(error):
            return False
        raise UserError(
            f"the other processes cannot be found ({_first_line(error)}); name them with --coordinator_address, "
            "--num_processes and --process_id, or run alone with CAMOPD_DISTRIBUTED=0 in the environment"
        ) from error
    return True


def _initialize(processes: Processes | None = None) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only used if the devices are CPUs
    jax.distributed.initialize(
        coordinator_address=processes.coordinator_address if processes else None,
        num_processes=processes.num_processes if processes else None,
        process_id=processes.process_id if processes else None,
        initialization_timeout=JOIN_TIMEOUT,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )


def _leave() -> None:
    jax.distributed.shutdown()
    leave_cluster()


def _check_port(processes: Processes) -> None:
    """Raises UserError unless process 0 can listen on the port; JAX would abort without naming the flag."""
    try:
        socket.create_server(("", processes.port)).close()
    except OSError as error:
        raise UserError(
            f"--coordinator_address={processes.coordinator_address}: process 0 cannot listen there "
            f"({os.strerror(error.errno or 0)}); give a free port"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _distributed_setting() -> str | None:
    return os.environ.get("CAMOPD_DISTRIBUTED")


def _may_detect() -> bool:
    """Whether JAX detects other processes, if no flags are given."""
    return _distributed_setting() == "1" or (_distributed_setting() != "0" and _on_cloud_tpu())


def _on_cloud_tpu() -> bool:
    """Whether JAX will use the TPU chips of this host."""
    chips = any(any(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    platforms = (jax.config.jax_platforms or "tpu").split(",")  # type: ignore[attr-defined]
    return chips and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None
