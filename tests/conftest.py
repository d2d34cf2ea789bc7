"""Eight simulated devices, no hub, and JAX's strict modes for every test."""

import itertools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from commands import Running

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """command(module, *args) -> exit code and output of `python -m camopd_jax.MODULE`."""
    folder, numbers = tmp_path_factory.mktemp("commands"), itertools.count()

    def run(module: str, *args, **options):
        return start(module, *args, **options).wait()

    def start(module: str, *args, **options) -> Running:
        return Running(folder / f"{next(numbers)}", f"camopd_jax.{module}", *args, **options)

    run.start = start
    return run
