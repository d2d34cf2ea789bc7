"""Progress of long work: what the program does and how much of it is done.

`work` names it. A command calls `report`; a thread then shows the current work: on a terminal in one line that is
rewritten, else in plain lines, the first after 3 seconds without output, others every 10 seconds.
"""

import atexit
import contextlib
import datetime
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

SILENT_SECONDS = 3.0  # without any output, after which a plain line is printed
LINE_SECONDS = 10.0  # minimum time between two plain lines
LIVE_SECONDS = 0.25  # between updates on a terminal
SHORT_SECONDS = 1.0  # shorter work is not shown
COMPILING = "/jax/core/compile/"  # first part of JAX's events of tracing, lowering and compilation
CACHE_HIT = "/jax/compilation_cache/cache_hits"

Show = Callable[[str], None]


class Work:
    """One kind of work, and how much of it is done."""

    def __init__(self, title: str, total: float = 0, unit: str = ""):
        """
        Args:
          total: how much there is to do in all; 0: not known.
          unit: of `total` and `done`. "GiB": they are bytes, shown in GiB.
        """
        self.title, self.total, self.unit = title, total, unit
        self._done = self._before = 0.0
        self.started = time.perf_counter()

    def start_with(self, done: float) -> None:
        """Sets how much was done before; the time left is computed from the rest."""
        self._done = self._before = done

    def add(self, amount: float = 1) -> None:
        self._done += amount

    def text(self, now: float) -> str:
        """The line of this work at the time `now`."""
        seconds, new = now - self.started, self._done - self._before
        if not self.unit:
            return f"{self.title}, {seconds:.0f} s" if seconds >= 1 else self.title
        if not self.total:
            return f"{self.title}: {self._amount(self._done)} {self.unit}"
        done = min(self._done, self.total)
        line = f"{self.title}: {self._amount(done)} of {self._amount(self.total)} {self.unit}"
        left = datetime.timedelta(seconds=round(seconds / new * (self.total - done))) if new > 0 else None
        return line if left is None else f"{line}, {left} left"

    def _amount(self, value: float) -> str:
        return f"{value / 2**30:.1f}" if self.unit == "GiB" else f"{value:,.0f}"


_current: list[Work] = []  # works inside each other, the outermost first


@contextlib.contextmanager
def work(title: str, total: float = 0, unit: str = "") -> Iterator[Work]:
    """Names what the block does, until its end; arguments as of `Work`."""
    new = Work(title, total, unit)
    _current.append(new)
    try:
        yield new
    finally:
        _current.remove(new)
        if _reporter is not None and not _current:
            _reporter.clear()


def current(now: float) -> str:
    """The line of all current works; "" if there is none, or only for a short time."""
    works = list(_current)
    if not works or now - works[0].started < SHORT_SECONDS:
        return ""
    return " · ".join(dict.fromkeys(one.text(now) for one in works))  # two threads may do the same


# ---------------------------------------------------------------------------------- compilation


class Compilations:
    """Counts the compiled programs of this process, and names the one that is compiled as current work."""

    def __init__(self) -> None:
        self.programs = self.cached = 0  # cached: read from the cache on disk instead
        self.seconds = 0.0  # of tracing, lowering, compiling and reading, in at least one thread
        self._thread, self._lock = threading.local(), threading.Lock()
        self._threads, self._since = 0, 0.0  # threads that compile now, and since when there is one

    def listen(self) -> None:
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)
        jax.monitoring.register_event_listener(self._event)

    def summary(self) -> str:
        compiled = self.programs - self.cached
        return f"{compiled} programs compiled and {self.cached} read from the cache, in {self.seconds:.0f} s"

    def _begin(self, event: str, value: float, **facts: str | int) -> None:
        if not event.startswith(COMPILING):
            return
        depth = getattr(self._thread, "depth", 0)  # traces of functions are inside each other
        if depth == 0:
            name = str(facts.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            count = f" (program {self.programs + 1}; {self.cached} were in the cache)"
            self._thread.work = work(f"compiling {name}{count}")
            self._thread.work.__enter__()
            with self._lock:
                self._threads += 1
                if self._threads == 1:
                    self._since = time.perf_counter()
        self._thread.depth = depth + 1

    def _end(self, event: str, duration_secs: float, **facts: str | int) -> None:
        if not event.startswith(COMPILING):
            return
        depth = getattr(self._thread, "depth", 0)
        if depth == 1:
            self._thread.work.__exit__(None, None, None)
        with self._lock:
            if depth == 1:
                self._threads -= 1
                if not self._threads:
                    self.seconds += time.perf_counter() - self._since
            elif depth == 0:  # a version of JAX without events for the start
                self.seconds += duration_secs
            self.programs += "backend_compile" in event
        self._thread.depth = max(0, depth - 1)

    def _event(self, event: str, **facts: str | int) -> None:
        with self._lock:
            self.cached += event == CACHE_HIT


compilations = Compilations()


# -------------------------------------------------------------------------------------- showing it


@functools.cache
def console() -> Console:
    """The console of everything that is printed beside progress."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())


class Reporter:
    """Shows the current work. `turn` is called again and again by a thread."""

    def __init__(self, show: Show, in_place: bool):
        """
        Args:
          show: prints a line, or if `in_place`, replaces the line; "" removes it.
        """
        self.show, self.in_place = show, in_place
        self._lock = threading.Lock()
        self._printed = time.perf_counter()  # when the last line of any kind was printed
        self._reported = -float("inf")  # when the last line of progress was

    def turn(self, now: float) -> None:
        with self._lock:
            text = current(now)
            if self.in_place:
                self.show(text)
            elif text and now - self._printed >= SILENT_SECONDS and now - self._reported >= LINE_SECONDS:
                self._printed = self._reported = now
                self.show(text)

    def printed(self) -> None:
        self._printed = time.perf_counter()

    def clear(self) -> None:
        """Removes a line that is rewritten, as the work has ended."""
        if self.in_place:
            with self._lock:
                self.show("")

    def replace(self, show: Show) -> None:
        with self._lock:
            if self.in_place:
                self.show("")
            self.show = show

    def run(self) -> None:
        while True:
            time.sleep(LIVE_SECONDS)
            self.turn(time.perf_counter())


_reporter: Reporter | None = None


def report() -> None:
    """Shows the progress of this process from now on."""
    global _reporter
    if _reporter is not None:
        return
    compilations.listen()
    in_place = console().is_terminal and console().is_interactive
    _reporter = Reporter(_StatusLine().show if in_place else console().print, in_place)
    threading.Thread(target=_reporter.run, name="progress", daemon=True).start()


def printed() -> None:
    """Must be called after other lines are printed: no line of progress follows at once."""
    if _reporter is not None:
        _reporter.printed()


def show_in(show: Show | None) -> None:
    """On a terminal, lets `show` replace a line with progress; None: a line of its own again."""
    if _reporter is not None and _reporter.in_place:
        _reporter.replace(show or _StatusLine().show)


class _StatusLine:
    """A line below everything that is printed, which is there only while there is work."""

    def __init__(self) -> None:
        self._live: Live | None = None

    def show(self, text: str) -> None:
        if not text:
            if self._live is not None:
                self._live.stop()
                atexit.unregister(self._live.stop)
            self._live = None
            return
        if self._live is None:
            self._live = Live(console=console(), auto_refresh=False, transient=True)
            self._live.start()
            atexit.register(self._live.stop)  # restores the cursor after an error
        self._live.update(Text(text, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)
