"""Every test has eight simulated devices, no hub and JAX's strict modes. Fixtures: a tiny transformer and answers."""

import itertools
import os

PLATFORM = os.environ.get("CAMOPD_TEST_PLATFORM", "cpu")  # cuda: for the tests marked `gpu` (benchmarks/gpu.sh)
os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ["HF_HUB_OFFLINE"] = "1"

from commands import QUICKLY_COMPILED, Pair, Running

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
if PLATFORM == "cpu":
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), EIGHT_DEVICES, QUICKLY_COMPILED])

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.types import LogProbs, Prompts, Rollout

jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB, ROWS, PROMPT, ANSWER = 14, 8, 5, 7


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory, worker_id):
    """A program that several tests need is compiled once for all modules and workers, and cached on disk."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Frees compiled programs after each module: thousands in one process exhaust its memory mappings."""
    yield
    jax.clear_caches()


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


@pytest.fixture(scope="session")
def pair(command):
    """pair(module, *args) -> a command started as two processes, which are killed after the test."""
    pairs = []

    def start(module: str, *args, **options) -> Pair:
        pairs.append(Pair(command, module, *args, **options))
        return pairs[-1]

    yield start
    for one in pairs:
        one.kill()


@pytest.fixture(scope="session")
def tiny():
    """(model, params): one layer, a vocabulary of 14."""
    config = from_hf(dict(model_type="qwen3", vocab_size=VOCAB, hidden_size=12, intermediate_size=20,
                          num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=6,
                          initializer_range=0.6))  # fmt: skip
    model = Model(config)
    return model, model.init(jax.random.key(3))


@pytest.fixture(scope="session")
def batch():
    """(prompts, rollout, scores) of eight rows of different lengths; padding has arbitrary values, not zero."""
    rng = np.random.default_rng(5)
    lengths = np.array([7, 3, 1, 5, 7, 2, 6, 4], np.int32)
    prompts = Prompts(
        jnp.asarray(rng.integers(0, VOCAB, (ROWS, PROMPT)), jnp.int32), jnp.array([5, 1, 3, 4, 2, 5, 3, 1], jnp.int32)
    )
    mask = np.arange(ANSWER) < lengths[:, None]
    student = np.where(mask, -rng.exponential(1.0, (ROWS, ANSWER)), 0).astype(np.float32)
    teacher = np.where(mask, -rng.exponential(1.0, (ROWS, ANSWER)), 0).astype(np.float32)
    rollout = Rollout(
        tokens=jnp.asarray(rng.integers(0, VOCAB, (ROWS, ANSWER)), jnp.int32),
        lengths=jnp.asarray(lengths),
        log_probs=jnp.asarray(np.where(mask, student + 0.1 * rng.normal(size=student.shape), 0), jnp.float32),
        entropy=jnp.ones(ROWS, jnp.float32),
        stopped=jnp.asarray(lengths < ANSWER),
    )
    return prompts, rollout, LogProbs(jnp.asarray(student), jnp.asarray(teacher))
