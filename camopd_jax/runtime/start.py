"""Initialisation that every command does before it creates arrays."""

from pathlib import Path

import jax

from camopd_jax.runtime import heap, progress
from camopd_jax.runtime.cluster import Processes, join
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.paths import cache_folder


def start(processes: Processes | None = None) -> None:
    """Connects to the run's other processes, enables the cache of compiled programs on disk, and shows progress.

    Args:
      processes: as in `runtime.cluster.join`.
    """
    join(processes)
    heap.return_large_blocks_at_once()
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        # A run compiles dozens of small programs; JAX's default stores only those that took a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if is_primary():
        folder = jax.config.values["jax_compilation_cache_dir"]
        count = 0 if "://" in folder else sum(1 for _ in Path(folder).glob("*-cache"))
        progress.console().print(f"compiled programs are kept in {folder}" + (f" ({count} so far)" if count else ""))
        progress.report()
