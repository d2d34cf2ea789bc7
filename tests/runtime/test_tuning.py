"""Which programs a GPU's compiler tunes: those of steps always, those outside them unless the config says so."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import compiler
from quickstart import QUICKSTART

from camopd_jax.config.schema import Compute
from camopd_jax.inference import answer, loading, log_probs
from camopd_jax.rollout import decode, generate, score
from camopd_jax.runtime import tuning
from camopd_jax.runtime.mesh import make_mesh

UNTUNED = {"xla_gpu_autotune_level": 0}
GENERALIST = QUICKSTART / "generalist"


@pytest.fixture
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("platform", "tuned", "options"),
    [("cpu", True, None), ("cpu", False, None), ("tpu", False, None), ("gpu", True, None), ("gpu", False, UNTUNED)],
)
def test_only_gpus_have_an_option(monkeypatch, one_device, platform, tuned, options):
    monkeypatch.setattr(tuning, "platform", lambda mesh: platform)
    assert tuning.compiler_options(one_device, tuned) == options


def test_the_option_is_one_of_the_compiler():
    """The CPU's compiler has all options of GPUs too, and refuses a name that it does not know."""
    double = jax.jit(lambda x: x * 2, compiler_options=UNTUNED)
    assert float(double(np.float32(3))) == 6
    with pytest.raises(Exception, match="xla_gpu_autotune_levels"):
        jax.jit(lambda x: x * 2, compiler_options={"xla_gpu_autotune_levels": 0})(np.float32(3))


@pytest.mark.parametrize("tuned", [True, False])
def test_the_option_reaches_products_of_sampling_and_scoring(monkeypatch, one_device, tuned):
    """Programs without products, such as those that copy a cache, have none."""
    given = {}
    monkeypatch.setattr(tuning, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(jax, "jit", lambda function, **options: given.update({function.__name__: options}))
    generate._jit.__wrapped__(one_device, decode, tuned)
    score._scoring.__wrapped__(one_device, tuned)
    with_option = {name for name, options in given.items() if options.get("compiler_options") == UNTUNED}
    assert with_option == (set() if tuned else {"begin", "advance", "score_rows"})
    assert {"grow", "join", "collect"} <= given.keys()


class Called(Exception):
    """Ends a call with the arguments of another one."""


@pytest.mark.parametrize(("autotune", "tuned"), [("all", True), ("steps", False)])
def test_the_config_says_it_for_what_is_outside_steps(monkeypatch, one_device, autotune, tuned):
    compute = Compute(autotune=autotune, matmul="float32")
    loaded = loading.load(GENERALIST, one_device, compute, dtype="float32", context=32)
    assert loaded.tuned == tuned and loaded.with_params(loaded.params).tuned == tuned

    def end(*_, tuned=None, **__):
        raise Called(tuned)

    monkeypatch.setattr(log_probs, "score_batch", end)
    with pytest.raises(Called) as scored:
        log_probs.score_responses(loaded, [[7, 8]], [[9]], batch_size=1)
    assert scored.value.args == (tuned,)
    ask = types.SimpleNamespace(answers=lambda model, params, prompts, keys, how: end(tuned=how.tuned),
                                for_decoding=lambda model, params: params)  # fmt: skip
    monkeypatch.setattr(answer, "generate", ask)
    with pytest.raises(Called) as sampled:
        answer.answer(loaded, [[7, 8]], max_new=4, batch_size=1)
    assert sampled.value.args == (tuned,)


def test_steps_are_always_tuned():
    assert generate.Decode(None, (), 4).tuned
    assert score.scoring.__defaults__ == generate.programs.__defaults__ == (True,)


def test_timings_of_kernels_are_cached_beside_the_compiled_programs():
    """By JAX's own default, which no setting here changes."""
    options = compiler.get_compile_options(1, 1)  # a name, as what it holds does not keep it in memory
    build = options.executable_build_options
    folder = Path(jax.config.values["jax_compilation_cache_dir"]) / "xla_gpu_per_fusion_autotune_cache_dir"
    assert build.debug_options.xla_gpu_per_fusion_autotune_cache_dir == str(folder)
