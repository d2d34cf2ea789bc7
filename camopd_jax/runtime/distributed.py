"""Communication between the processes of a run, after `cluster` has connected them. Also works with one process.

Process 0 writes files and prints. It broadcasts what only it reads or measures, so that all processes make the same
decisions and call the same collectives.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from camopd_jax.errors import UserError

MAX_ERROR_BYTES = 2048  # maximum length of an error message that is sent to the other processes
T = TypeVar("T")


def is_distributed() -> bool:
    """Whether the run has several processes."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have called it with this name."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def broadcast(make: Callable[[], Any]) -> Any:
    """Calls `make` on process 0 and returns its JSON value on every process.

    Raises:
      UserError: on every process, if `make` raises it on process 0.
    """
    if not is_distributed():
        return make()
    sent = b""
    if is_primary():
        try:
            sent = json.dumps({"value": make()}).encode()
        except UserError as error:
            sent = json.dumps({"error": str(error)}).encode()
    received = json.loads(_broadcast_bytes(sent))
    if "error" in received:
        raise UserError(received["error"])
    return received["value"]


def _broadcast_bytes(sent: bytes) -> bytes:
    """Returns the bytes that process 0 passes; those of the other processes are ignored."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few different sizes, for few compilations
    if is_primary():
        padded[:size] = np.frombuffer(sent, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)[:size].tobytes()


def run_on_all(act: Callable[[], T]) -> T:
    """Calls `act` on every process and returns this process's result.

    Raises:
      UserError: on every process, if `act` raises it on one of them; otherwise the others would wait for it.
    """
    if not is_distributed():
        return act()
    failure: UserError | None = None
    try:
        result = act()
    except UserError as error:
        failure = error
    sent = str(failure or "").encode()[:MAX_ERROR_BYTES].ljust(MAX_ERROR_BYTES, b"\0")
    of_each = multihost_utils.process_allgather(np.frombuffer(sent, np.uint8))
    if failure is not None:
        raise failure
    for number, row in enumerate(of_each):
        if text := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise UserError(f"process {number} cannot continue: {text}")
    return result
