"""How Orbax reads and writes the arrays of a training state, so that a damaged checkpoint is one error and no more.

Orbax reads all arrays at once in an event loop of its own and raises the first error. Since 0.12 it then closes the
loop while other reads go on, where 0.11 cancelled them (`_run_sync_via_new_loop` in
https://github.com/google/orbax/blob/main/checkpoint/orbax/checkpoint/_src/asyncio_utils.py). As each of them ends, a
thread of TensorStore prints the traceback of "RuntimeError: Event loop is closed". Here an error goes on when the reads
that were started with the failed one have ended.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees of arrays, with the reads of this module."""
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Both methods that open arrays; the arguments and results are Orbax's."""

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        return await _when_all_have_ended(super().metadata(infos))

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.type_handlers.RestoreArgs] | None = None,
    ) -> Sequence[jax.Array]:
        return await _when_all_have_ended(super().deserialize(infos, args))


async def _when_all_have_ended(read: Awaitable[T]) -> T:
    """The result of a read; its error, after the tasks that were started since have ended."""
    before = asyncio.all_tasks()
    try:
        return await read
    except Exception:
        while started := asyncio.all_tasks() - before:  # these start others: an array that is opened, its shards' reads
            await asyncio.gather(*started, return_exceptions=True)
        raise
