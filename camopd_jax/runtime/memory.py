"""The peak memory of a run."""

import resource
import sys

import jax


def memory_gib() -> float:
    """Peak memory in GiB: the maximum over local devices if the backend reports it, else of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(peaks):
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
