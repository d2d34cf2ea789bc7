"""Autotuning: on a GPU, XLA times several kernels for each matrix product of a program while it compiles it."""

from typing import Any

from jax.sharding import Mesh

from camopd_jax.runtime.mesh import platform


def compiler_options(mesh: Mesh | None, tuned: bool) -> dict[str, Any] | None:
    """The options of `jax.jit` for a program that runs on a mesh.

    Args:
      tuned: whether its products are worth the time; False has an effect on GPUs only.
    """
    return None if tuned or platform(mesh) != "gpu" else {"xla_gpu_autotune_level": 0}
