"""Programs compiled while models are loaded: the run's own, which then need no compilation; and what fails."""

import threading
import types
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from quickstart import QUICKSTART

from camopd_jax.config import TrainConfig, default
from camopd_jax.config.consistency import from_config_dict
from camopd_jax.planning import ahead
from camopd_jax.runs.session import open_session

OF_STEPS = {"begin", "advance", "score_rows", "_select", "add_gradient", "recovery_update", "review_update"}


def one_width():
    """A run whose prompts and answers are always padded to the cap, so that all shapes are known before."""
    config = default(TrainConfig)
    config.general_model, config.specialised_model = str(QUICKSTART / "generalist"), str(QUICKSTART / "specialist")
    config.branches.recovery.prompts.source = str(QUICKSTART / "general_prompts.jsonl")
    config.branches.review.prompts.source = str(QUICKSTART / "domain_prompts.jsonl")
    config.branches.recovery.steps = 1
    config.rollout.batch_size, config.optimizer.micro_batch = 8, 8
    config.rollout.max_prompt_tokens = config.rollout.max_response_tokens = 64
    config.rollout.smallest_bucket = 128  # of prompt and answer together
    return from_config_dict(TrainConfig, config)


class Compiled:
    """Names of the programs that this thread compiles, without those that it reads from the cache on disk."""

    def __init__(self):
        self.names, self._in_cache, self._thread = [], False, threading.get_ident()
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._ended)

    def _event(self, event, **_):
        if threading.get_ident() == self._thread:
            self._in_cache |= event == "/jax/compilation_cache/cache_hits"

    def _ended(self, event, _, fun_name="", **__):
        if threading.get_ident() == self._thread and "backend_compile" in event:
            if not self._in_cache:
                self.names.append(fun_name.removeprefix("jit(").removesuffix(")"))
            self._in_cache = False

    def close(self):
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._ended)


@pytest.fixture
def empty_cache(tmp_path):
    """empty_cache(name): no program is compiled any more, in memory or in the cache on disk."""
    before = jax.config.values["jax_compilation_cache_dir"]

    def use(folder):
        jax.clear_caches()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        compilation_cache.reset_cache()

    yield lambda name: use(tmp_path / name)
    use(before)


def two_steps(config):
    """(names of the steps' programs that were compiled in two steps, the student after them)."""
    session = open_session(config)
    compiled = Compiled()
    try:
        session.step()
        session.step()
    finally:
        compiled.close()
    return OF_STEPS & set(compiled.names), jax.tree.map(np.asarray, session.state.params)


@pytest.mark.slow
def test_the_steps_compile_nothing_that_was_compiled_ahead(empty_cache):
    config = one_width()
    empty_cache("ahead")
    with ahead.compiling(partial(ahead.known_programs, config)) as wait:
        wait()
    names, after = two_steps(config)
    assert not names
    empty_cache("without")
    names, expected = two_steps(config)
    assert names == OF_STEPS
    jax.tree.map(np.testing.assert_array_equal, after, expected)


class Broken:
    """A program that cannot be compiled."""

    name = "decode"

    def lower(self):
        raise ValueError("no such\nshape")


def test_what_fails_is_printed_and_stops_nothing(monkeypatch):
    lines, compiled = [], []
    monkeypatch.setattr(ahead, "console", lambda: types.SimpleNamespace(print=lines.append))
    fine = types.SimpleNamespace(
        name="update", lower=lambda: types.SimpleNamespace(compile=lambda: compiled.append("update"))
    )
    with ahead.compiling(lambda: [Broken(), fine]) as wait:
        wait()
    assert compiled == ["update"]
    assert lines == ["warning: decode not compiled while the models were loaded: ValueError: no such"]

    def no_list():
        raise OSError("config.json is gone")

    with ahead.compiling(no_list) as wait:
        wait()
    assert lines[1:] == ["warning: programs not compiled while the models were loaded: OSError: config.json is gone"]


def test_an_error_of_the_run_leaves_programs_out_that_have_not_begun():
    started, go_on = [], threading.Event()

    def lower():
        started.append(1)
        go_on.wait(10)
        return types.SimpleNamespace(compile=lambda: None)

    several = [types.SimpleNamespace(name="update", lower=lower)] * 50
    with pytest.raises(KeyError), ahead.compiling(lambda: several):
        while len(started) < ahead.WORKERS:
            pass
        threading.Timer(0.2, go_on.set).start()
        raise KeyError
    assert len(started) == ahead.WORKERS


@pytest.mark.parametrize(
    ("wanted", "backend", "processes", "on"),
    [("auto", "cpu", 1, False), ("auto", "gpu", 1, True), ("auto", "tpu", 1, True), ("on", "cpu", 1, True),
     ("off", "gpu", 1, False), ("auto", "gpu", 2, False), ("on", "gpu", 2, False)],
)  # fmt: skip
def test_when_a_run_compiles_ahead(monkeypatch, wanted, backend, processes, on):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(ahead, "is_distributed", lambda: processes > 1)
    config = default(TrainConfig)
    config.general_model = config.specialised_model = "x"
    config.branches.recovery.prompts.source = config.branches.review.prompts.source = "x"
    config.compute.compile_ahead = wanted
    assert ahead.is_on(from_config_dict(TrainConfig, config)) == on
