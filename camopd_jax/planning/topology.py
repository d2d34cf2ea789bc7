"""TPU topologies that may be absent: their names, their chips' memory and speed, and devices to compile for."""

import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from camopd_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Public numbers of one chip, from the tables at https://docs.cloud.google.com/tpu/docs/ (v4, v5e, v5p, v6e).

    `hbm` is what the TPU compiler reports as available, its capacity less what the compiler reserves.
    """

    name: str
    hbm: float  # bytes a program can have
    flops: float  # per second, bfloat16
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second and chip, both directions of all links
    dimensions: int  # of the torus
    longest: int  # chips along one side


CHIPS = {
    "v4": Chip("v4", 30.75 * 2**30, 275e12, 1228e9, 300e9, 3, 16),
    "v5e": Chip("v5e", 15.75 * 2**30, 197e12, 819e9, 400e9, 2, 16),
    "v5p": Chip("v5p", 95.73 * 2**30, 459e12, 2765e9, 1200e9, 3, 24),
    "v6e": Chip("v6e", 31.24 * 2**30, 918e12, 1638e9, 800e9, 2, 16),
}
MEGACORE = ("v4", "v5p")  # chips whose two cores act as one device


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    platform: str  # "tpu", "cpu" or "gpu"
    devices: tuple[Any, ...]
    chip: Chip | None  # None: a local device, whose speed is not known
    hbm: float | None  # bytes per device; None: unknown


def describe(name: str, hbm_gib: float | None = None) -> Topology:
    """The topology of that name, as "v5e:8x8"; "local": this process's devices.

    Raises:
      UserError: for an unknown name, and if libtpu is not installed.
    """
    hbm = None if hbm_gib is None else hbm_gib * 2**30
    if name == "local":
        here = tuple(jax.devices())
        limit = (here[0].memory_stats() or {}).get("bytes_limit")
        return Topology("local", here[0].platform, here, None, hbm or limit)
    chip = check_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs the TPU compiler; pip install 'camopd_jax[plan]'")
    _prepare_libtpu()
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if chip.name in MEGACORE else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology={name}: the TPU compiler rejects it: {reason}") from error
    return Topology(name, "tpu", tuple(devices), chip, hbm or chip.hbm)


@dataclass(frozen=True)
class AbsentDevice:
    """A GPU that need not be present: enough of a device for meshes and arithmetic, and not to compile for."""

    id: int
    platform: str = "gpu"
    device_kind: str = "absent"
    process_index: int = 0


def absent_gpus(count: int, hbm: float) -> Topology:
    """GPUs of `hbm` bytes each, of which no speed is known."""
    return Topology(f"{count} GPUs", "gpu", tuple(map(AbsentDevice, range(count))), None, hbm)


def check_name(name: str) -> Chip:
    """The chip of a topology's name. The TPU compiler would end the process at sides that it does not have.

    Raises:
      UserError: for an unknown name.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in CHIPS:
        raise UserError(f"--topology={name}: give local, or a slice such as v5e:8x8, v6e:4x4, v5p:4x4x4 or v4:2x2x4")
    chip, sides = CHIPS[match[1]], [int(side) for side in match[2].split("x")]
    if len(sides) != chip.dimensions or not all(1 <= side <= chip.longest for side in sides):
        raise UserError(
            f"--topology={name}: a {chip.name} slice has {chip.dimensions} sides of 1 to {chip.longest} chips"
        )
    return chip


def _prepare_libtpu() -> None:
    """Keeps libtpu from looking for chips in the cloud, from logging, and from flags for CPUs that it does not know, at
    which it would end the process.
    """
    defaults = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    defaults |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no chip is used: two plans may run at once
    defaults |= dict.fromkeys(("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"), "3")
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if flags := os.environ.get("XLA_FLAGS"):
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags.split() if not flag.startswith("--xla_cpu_"))
    with contextlib.suppress(RuntimeError):  # if JAX runs already, it has its devices
        jax.config.update("jax_platforms", "cpu")
