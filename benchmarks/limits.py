"""What a device can do at most: published for the accelerators that are named here, else measured on the spot."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from camopd_jax.models.products import precision
from camopd_jax.planning.topology import CHIPS

# Dense bfloat16 FLOP/s and bytes/s of the vendors' data sheets, by how JAX names a device.
PUBLISHED = {
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.56e12),
} | {
    kind: (CHIPS[chip].flops, CHIPS[chip].hbm_bandwidth)
    for kind, chip in {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
        "TPU v6e": "v6e",
    }.items()
}  # fmt: skip
WIDTH, TIMES = 4096, 5


@dataclass(frozen=True)
class Limits:
    """Of all devices of this process together."""

    flops: float  # per second, of matrix products
    bandwidth: float  # bytes per second that are read from memory
    source: str


def limits(dtype: str, width: int = WIDTH) -> Limits:
    """Those of this machine, for products in this precision. Published ones are for bfloat16.

    Args:
      width: of the product that is measured; a smaller one takes less time, and does not reach the limit.
    """
    devices = jax.devices()
    if dtype == "bfloat16" and (known := PUBLISHED.get(devices[0].device_kind)):
        return Limits(*(len(devices) * limit for limit in known), "published")
    return Limits(*(len(devices) * limit for limit in _measured(jnp.dtype(dtype), width)), "measured")


def _measured(dtype: jnp.dtype, width: int) -> tuple[float, float]:
    """Of one device: a product of [2048, 4096] and [4096, 4096], and the sum of 512 MiB, for a width of 4096."""
    left, right = jnp.ones((width // 2, width), dtype), jnp.ones((width, width), dtype)
    product = _seconds(jax.jit(partial(jnp.matmul, precision=precision(dtype))), left, right)
    reading = _seconds(jax.jit(jnp.sum), jnp.ones(8 * width * width, jnp.float32))
    return left.size * 2 * width / product, 32 * width * width / reading


def _seconds(act: Callable, *args: jax.Array) -> float:
    jax.block_until_ready(act(*args))
    taken = []
    for _ in range(TIMES):
        started = time.perf_counter()
        jax.block_until_ready(act(*args))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
