"""Measures the seconds of a step by stage."""

import contextlib
import time
from collections.abc import Iterator

from camopd_jax.runtime.progress import work


class Stages:
    """Measures the stages of a step: `with stages("rollout"): ...`. The time of a nested stage is not counted twice."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of finished stages inside the current one

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        started = time.perf_counter()
        with work(name):
            yield
        elapsed = time.perf_counter() - started
        self._seconds[name] = self._seconds.get(name, 0.0) + elapsed - self._inner
        self._inner = outer + elapsed

    def finish(self) -> dict[str, float]:
        """Ends the step: returns its seconds by stage, and resets them."""
        seconds, self._seconds = self._seconds, {}
        return seconds
