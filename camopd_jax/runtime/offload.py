"""Offloading: keeps arrays in host memory except while they are needed on the devices.

A step needs only one teacher, and Adam's moments only at its end. While an array is in host memory, its copy on the
devices is deleted, even if other references to it exist. Copies between host and devices run in the background, while
the devices compute.
"""

from typing import Any

import jax

HOST, DEVICE = "pinned_host", "device"


class Offloaded:
    """A tree of constant arrays, which are on the devices between `fetch` and `release`."""

    def __init__(self, tree: Any):
        """Moves the arrays to the host; the given arrays are deleted."""
        self._on_host = to_host(tree)
        self._on_devices: Any = None

    def fetch(self) -> Any:
        """The arrays on the devices; returns at once, while the copy runs in the background."""
        if self._on_devices is None:
            self._on_devices = _copy(self._on_host, DEVICE)
        return self._on_devices

    def release(self) -> None:
        """Deletes the copy on the devices."""
        if self._on_devices is not None:
            _delete(self._on_devices)
            self._on_devices = None


class OffloadSlot:
    """A place for one tree of arrays that changes at each use: `put` stores it, `take` returns it."""

    def __init__(self) -> None:
        self._tree: Any = None
        self._on_host = False

    @property
    def is_empty(self) -> bool:
        return self._tree is None

    def put(self, tree: Any) -> None:
        """Moves the arrays to the host, unless a tree is already stored; the given arrays are deleted."""
        if self._tree is None:
            self._tree, self._on_host = to_host(tree), True

    def fetch(self) -> None:
        """Starts to move the arrays to the devices; returns at once."""
        if self._on_host:
            self._tree, self._on_host = to_devices(self._tree), False

    def take(self) -> Any:
        """Returns the arrays on the devices; the place is empty afterwards."""
        self.fetch()
        tree, self._tree = self._tree, None
        return tree


def to_host(tree: Any) -> Any:
    """Moves arrays to host memory with the same sharding; those on the devices are deleted."""
    return _move(tree, HOST)


def to_devices(tree: Any) -> Any:
    """Moves arrays to the devices; those on the host are deleted."""
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
