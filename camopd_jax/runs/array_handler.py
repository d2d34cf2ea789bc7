"""An Orbax array handler that raises only one error for a damaged checkpoint or a full disk.

Orbax reads and writes all arrays concurrently in its own event loop and raises the first error. Since 0.12 it then
closes the loop while others continue; 0.11 cancelled them (`_run_sync_via_new_loop` in
https://github.com/google/orbax/blob/main/checkpoint/orbax/checkpoint/_src/asyncio_utils.py). When one of these ends, a
thread of TensorStore prints the traceback of "RuntimeError: Event loop is closed". This handler raises an error only
after all reads or writes that started together with the failed one have ended.
"""

import asyncio
import sys
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for trees of arrays, with this module's array handler."""
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Changes both methods that open arrays. Writes start in a function without a method around it: `_when_written`."""

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        return await _when_all_have_ended(super().metadata(infos))

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.type_handlers.RestoreArgs] | None = None,
    ) -> Sequence[jax.Array]:
        return await _when_all_have_ended(super().deserialize(infos, args))


async def _when_all_have_ended(read: Awaitable[T]) -> T:
    """Awaits a read or write. If it fails, waits for the tasks that were started since, then raises its error."""
    before = asyncio.all_tasks()
    try:
        return await read
    except Exception:
        while started := asyncio.all_tasks() - before:  # these start others: an array that is opened, its shards' reads
            await asyncio.gather(*started, return_exceptions=True)
        raise


_HANDLERS = sys.modules[ocp.type_handlers.ArrayHandler.__module__]
_WRITE = "_async_serialize_replica_slices"  # the function in the versions that close the loop
_write = getattr(_HANDLERS, _WRITE, None)


async def _when_written(*args: Any, **options: Any) -> Any:
    """Orbax's function that writes arrays, in the background."""
    assert _write is not None
    return await _when_all_have_ended(_write(*args, **options))


if _write is not None:
    setattr(_HANDLERS, _WRITE, _when_written)
