"""Eight simulated devices, no hub, and JAX's strict modes for every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from commands import Running

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture
def command(session_folder):
    """command(module, *args) -> exit code and output of `python -m camopd_jax.MODULE`."""

    def run(module: str, *args, **options):
        return start(module, *args, **options).wait()

    def start(module: str, *args, **options) -> Running:
        number = sum(1 for _ in session_folder.iterdir())
        return Running(session_folder / f"{number}", f"camopd_jax.{module}", *args, **options)

    run.start = start
    return run
