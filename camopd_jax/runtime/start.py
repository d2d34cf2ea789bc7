"""What every command does before its first array."""

import os
from pathlib import Path

import jax

from camopd_jax.runtime import heap
from camopd_jax.runtime.cluster import Processes, join


def start(processes: Processes | None = None) -> None:
    """Joins the run's other processes, if any, and keeps compiled programs on disk for the next run.

    Args:
      processes: the address, number and rank of the processes, as `runtime.cluster.join` takes it; None: JAX's own
        discovery on Cloud TPU, else one process.
    """
    join(processes)
    heap.return_large_blocks_at_once()
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "camopd_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # Small programs too: a run compiles dozens, and JAX's default keeps only those that took a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
