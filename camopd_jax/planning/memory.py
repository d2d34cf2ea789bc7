"""Whether a run can fit in memory: by arithmetic alone, before anything is loaded or compiled."""

import os
from pathlib import Path

import jax

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.method.branches import find_model, teacher_names
from camopd_jax.method.setup import Setup, resolve
from camopd_jax.planning.arrays import FILES, ModelShapes, read_folders
from camopd_jax.planning.costs import memory_estimate

GIB = 2**30
UNCERTAINTY = 2.0  # activations are estimated roughly: a run is refused only at this multiple of the memory


def check_run(config: TrainConfig) -> None:
    """Checks a run on this process's devices, from the models' config.json files.

    Raises:
      UserError: as `check_memory`, and for models, meshes and batches that `train` refuses too.
    """
    setup = resolve(config)
    folders = {name: find_model(config, name, field, files=FILES) for name, field in teacher_names(config).items()}
    loading.check_adapter(config.adapter, folders["specialised"], "config.specialised_model")
    check_memory(setup, read_folders(config, folders, setup.context), device_memory())


def check_memory(setup: Setup, models: ModelShapes, limit: float) -> float:
    """Checks the largest programs of a run.

    Args:
      limit: bytes of one device.

    Returns:
      The bytes of parameters, gradient, Adam's moments and teachers on one device.

    Raises:
      UserError: naming the stage that certainly needs more than a device has.
    """
    estimate = memory_estimate(setup, models)
    least = estimate["update"]
    if least > limit:
        advice = "" if setup.config.compute.offloads else " or config.compute.offload=late"
        raise UserError(
            f"parameters, gradient, Adam's moments and teachers take {least / GIB:.2f} GiB per device, which has "
            f"{limit / GIB:.2f} GiB; use more devices{advice}"
        )
    stage = max(estimate, key=estimate.__getitem__)
    if estimate[stage] > UNCERTAINTY * limit:
        lower = "config.optimizer.micro_batch" if stage == "gradient" else "config.rollout.concurrency or batch_size"
        raise UserError(
            f"{stage} takes about {estimate[stage] / GIB:.4g} GiB per device, which has {limit / GIB:.2f} GiB; give a "
            f"smaller {lower}, lower config.rollout.max_response_tokens, or use more devices"
        )
    return least


def device_memory() -> float:
    """Bytes of one of this process's devices; of a CPU device, its part of the machine's or container's memory."""
    devices = jax.local_devices()
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        return float(limit)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")  # of the container
    if group.exists() and (text := group.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total / len(devices)
