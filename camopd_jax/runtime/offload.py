"""Arrays that wait in host memory and are on the devices only while they are needed.

Of a step only one teacher works, and Adam's moments are needed at its end alone. An array that waits has no second copy
on the devices: the one there is deleted, whoever else still refers to it. Copies between host and devices go on while
the devices compute what was asked for before.
"""

from typing import Any

import jax

HOST, DEVICE = "pinned_host", "device"


class Offloaded:
    """A tree of arrays that do not change, on the devices between `fetch` and `release`."""

    def __init__(self, tree: Any):
        """Moves the arrays to the host; those given are deleted."""
        self._on_host = to_host(tree)
        self._on_devices: Any = None

    def fetch(self) -> Any:
        """The arrays on the devices; returns at once, while the copy goes on."""
        if self._on_devices is None:
            self._on_devices = _copy(self._on_host, DEVICE)
        return self._on_devices

    def release(self) -> None:
        """Deletes the copy on the devices."""
        if self._on_devices is not None:
            _delete(self._on_devices)
            self._on_devices = None


class Waiting:
    """A tree of arrays that is needed now and then, and comes back another one."""

    def __init__(self) -> None:
        self._tree: Any = None
        self._on_host = False

    def park(self, tree: Any) -> None:
        """Moves the arrays to the host, if none wait there already; those given are deleted."""
        if self._tree is None:
            self._tree, self._on_host = to_host(tree), True

    def fetch(self) -> None:
        """Begins to move the arrays to the devices; returns at once."""
        if self._on_host:
            self._tree, self._on_host = to_devices(self._tree), False

    def take(self) -> Any:
        """The arrays, on the devices; none wait any more."""
        self.fetch()
        tree, self._tree = self._tree, None
        return tree


def to_host(tree: Any) -> Any:
    """The arrays in host memory, each split over the devices' hosts as before; those on the devices are deleted."""
    return _move(tree, HOST)


def to_devices(tree: Any) -> Any:
    """The arrays in the devices' memory; those on the host are deleted."""
    return _move(tree, DEVICE)


def _move(tree: Any, kind: str) -> Any:
    copy = _copy(tree, kind)
    _delete(tree)  # the runtime keeps the memory until the copy is done
    return copy


def _copy(tree: Any, kind: str) -> Any:
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


def _delete(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
