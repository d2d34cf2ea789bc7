"""What the processes of a run do together. Alone, a process does the same without the others.

Process 0 writes files and prints. What it alone reads or measures it shares, so that all take the same turns and meet
in the same collectives.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from camopd_jax.errors import UserError

LONGEST = 2048  # bytes of an error that is told to the others
T = TypeVar("T")


def is_distributed() -> bool:
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here, at the place of this name."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def broadcast(make: Callable[[], Any]) -> Any:
    """`make()` of process 0, a JSON value, on every process.

    Raises:
      UserError: on every process, if it is raised on the first.
    """
    if not is_distributed():
        return make()
    told, sent = None, b""
    if is_primary():
        try:
            told = {"value": make()}
        except UserError as error:
            told = {"error": str(error)}
        sent = json.dumps(told).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few widths, so few compilations
    padded[: len(sent)] = np.frombuffer(sent, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)[:size].tobytes())
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def run_on_all(act: Callable[[], T]) -> T:
    """`act()` on every process.

    Raises:
      UserError: on every process, if it is raised on one: else the others would wait for that one.
    """
    if not is_distributed():
        return act()
    result, told = None, ""
    try:
        result = act()
    except UserError as error:
        told = str(error)
    own = np.frombuffer(told.encode()[:LONGEST].ljust(LONGEST, b"\0"), np.uint8)
    for number, row in enumerate(multihost_utils.process_allgather(own)):
        if text := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise UserError(told or f"process {number} cannot go on: {text}")
    return result
