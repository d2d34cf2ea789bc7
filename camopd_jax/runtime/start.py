"""Initialisation that every command does before it creates arrays."""

import os
from pathlib import Path

import jax

from camopd_jax.runtime import heap
from camopd_jax.runtime.cluster import Processes, join


def start(processes: Processes | None = None) -> None:
    """Connects to the run's other processes, if any, and enables the cache of compiled programs on disk.

    Args:
      processes: as in `runtime.cluster.join`.
    """
    join(processes)
    heap.return_large_blocks_at_once()
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "camopd_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # A run compiles dozens of small programs; JAX's default stores only those that took a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
