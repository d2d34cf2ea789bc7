"""Whether a run can fit in memory: by arithmetic alone, before anything is loaded or compiled."""

import os
from pathlib import Path
from typing import cast

import jax

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.method.branches import find_model, teacher_names
from camopd_jax.method.setup import Setup, resolve
from camopd_jax.planning.arrays import FILES, ModelShapes, read_folders
from camopd_jax.planning.automatic import Choice, Values, choose, stored_values
from camopd_jax.planning.costs import memory_estimate
from camopd_jax.planning.search import changed
from camopd_jax.runtime.distributed import broadcast, run_on_all

GIB = 2**30
UNCERTAINTY = 2.0  # activations are estimated roughly: a run is refused only at this multiple of the memory


def prepare_run(config: TrainConfig, workdir: str | None = None) -> Choice:
    """Chooses values as `choose_here` and checks the run on this process's devices.

    Raises:
      UserError: as `check_memory`, and for models, meshes and batches that `train` refuses too.
    """
    models = run_on_all(lambda: _read_models(config))
    choice = _choose(config, models, workdir)
    run_on_all(lambda: check_memory(resolve(choice.config), models, device_memory()))
    return choice


def choose_here(config: TrainConfig) -> TrainConfig:
    """The config with values for fields that are "auto", chosen for this process's devices."""
    return _choose(config, run_on_all(lambda: _read_models(config)), None).config


def _choose(config: TrainConfig, models: ModelShapes, workdir: str | None) -> Choice:
    """Every process must call it; all get the same values, for the memory of process 0's devices.

    Args:
      workdir: of a run, whose values are kept when it is resumed.
    """

    def once() -> tuple[Values, float, float]:
        choice = choose(config, models, None, device_memory(), stored_values(workdir))
        return choice.values, choice.needs, choice.limit

    values, needs, limit = broadcast(once)
    return Choice(cast(TrainConfig, changed(config, values)), values, needs, limit)


def _read_models(config: TrainConfig) -> ModelShapes:
    folders = {name: find_model(config, name, field, files=FILES) for name, field in teacher_names(config).items()}
    loading.check_adapter(config.adapter, folders["specialised"], "config.specialised_model")
    rollout = config.rollout
    return read_folders(config, folders, rollout.max_prompt_tokens + rollout.max_response_tokens)


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
