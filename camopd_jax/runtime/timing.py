"""Seconds of a step, by stage."""

import contextlib
import time
from collections.abc import Iterator


class Stages:
    """Measures the stages of a step: `with stages("rollout"): ...`. A stage's time is not part of the one around it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of the finished stages inside the present one

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._seconds[name] = self._seconds.get(name, 0.0) + elapsed - self._inner
        self._inner = outer + elapsed

    def finish(self) -> dict[str, float]:
        """The seconds of the step that ends here, by stage; the next step begins."""
        seconds, self._seconds = self._seconds, {}
        return seconds
