"""What a run tells while it goes: metrics.jsonl, TensorBoard files, samples, and a live display.

It deals in numbers of the host and knows nothing of JAX's arrays.
"""

import atexit
import contextlib
import datetime
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows, write_rows

PLAIN_SECONDS = 2.0  # without a terminal, a line at most this often
PROGRESS_SECONDS = 15.0  # the same, of a work that is no step
COLOURS = {"recovery": "cyan", "review": "magenta", "mixed": "blue", "sft": "green"}


class Stages:
    """Seconds of a step, by stage. Stages may nest: the time of an inner one is not its outer's."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of the stages inside the present one

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        self._seconds[name] = self._seconds.get(name, 0.0) + took - self._inner
        self._inner = outer + took

    def finish(self) -> dict[str, float]:
        """The seconds of the step that ends here, by stage."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def memory_gib() -> float:
    """Peak memory in GiB: of the fullest local device where the backend tells, else of this process."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    if max(peaks):
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsWriter:
    """Appends to the files of a work directory; of many processes, the first one writes."""

    def __init__(self, workdir: epath.Path, tensorboard: bool):
        self._workdir, self._writes = workdir, is_primary()
        if self._writes and (workdir / "eval.jsonl").exists():  # the next row must not join one cut by a kill
            write_rows(workdir / "eval.jsonl", read_rows(workdir / "eval.jsonl"))
        self._events = None
        if tensorboard and self._writes:
            from tensorboardX import SummaryWriter  # slow to import

            self._events = SummaryWriter(str(workdir / "tensorboard"), flush_secs=10)

    def step(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Numbers that are not finite become null."""
        self._append("metrics.jsonl", [row])
        self._scalars(row["phase"], row)

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        self._append("samples.jsonl", rows)

    def selection(self, rows: Sequence[dict[str, Any]]) -> None:
        self._append("selection.jsonl", rows)

    def diagnosis(self, row: dict[str, Any]) -> None:
        """One line of diagnostics.jsonl, and its figures for TensorBoard."""
        self._append("diagnostics.jsonl", [row])
        self._scalars("diagnostics", row)

    def diagnosed(self) -> set[int]:
        """Steps whose line diagnostics.jsonl has."""
        return set(broadcast(lambda: [row["step"] for row in read_rows(self._workdir / "diagnostics.jsonl")]))

    def evaluation(self, row: dict[str, Any], figure: str, value: float) -> None:
        """One line of eval.jsonl, unless it is there already, and one figure of it for TensorBoard."""
        if not self._writes or row in read_rows(self._workdir / "eval.jsonl"):
            return
        self._append("eval.jsonl", [row])
        if self._events:
            self._events.add_scalar(f"{figure}/{row['model']}/{row['benchmark']}", value, row["step"])
            self._events.flush()

    def close(self) -> None:
        if self._events:
            self._events.close()

    def _scalars(self, prefix: str, row: dict[str, Any]) -> None:
        """A row's figures for TensorBoard."""
        if self._events:
            for name, value in _flat(row):
                self._events.add_scalar(f"{prefix}/{name}", value, row["step"])
            self._events.flush()

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if not self._writes or not rows:
            return
        append_rows(self._workdir / name, rows)


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and name != "step":
            yield prefix + name, value


class Display:
    """Two live lines on a terminal; without one, plain lines. NO_COLOR is honoured."""

    def __init__(self, total: int, start: int):
        on_terminal = sys.stdout.isatty()
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not on_terminal)
        self._quiet = not is_primary()
        self._total, self._started, self._first = total, time.perf_counter(), start
        self._last = -math.inf
        self._live = None
        if on_terminal and self._console.is_interactive and not self._quiet:
            self._bar = Progress(
                SpinnerColumn(style="dim"), TextColumn("{task.description}"),
                BarColumn(bar_width=24, complete_style="default", finished_style="default"),
                MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[speed]}"),
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=total, completed=start, speed="")
            self._figures = Text(style="dim", no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._bar, self._figures), console=self._console, refresh_per_second=8)
            self._live.start()
            atexit.register(self._live.stop)  # an error must not leave the terminal without its cursor

    def step(self, row: dict[str, Any]) -> None:
        """Shows a step's row of metrics."""
        figures = [f"loss {row['loss']:.4f}"]
        if "gap_mean" in row:
            figures += [
                f"gap {row['gap_mean']:+.4f}",
                f"|gap| {row['gap_abs_mean']:.4f}",
                f"kept {100 * row['selected_fraction']:.0f} %",
                f"length {row['length_mean']:.0f}",
            ]
        if row["skipped"]:
            figures.append("SKIPPED: not finite")
        done, text, speed = row["step"] + 1, " · ".join(figures), f"{row['tokens_per_second']:.0f} tok/s"
        if self._live:
            phase = f"[{COLOURS[row['phase']]}]{row['phase']:<8}[/]"
            self._bar.update(self._task, description=phase, completed=done, speed=speed)
            self._figures.plain = f"  {text}"
            return
        now = time.perf_counter()
        if now - self._last < PLAIN_SECONDS and done < self._total and not row["skipped"]:
            return
        self._last = now
        left = (now - self._started) / max(1, done - self._first) * (self._total - done)
        left = datetime.timedelta(seconds=round(left))
        self.say(f"step {done}/{self._total} {row['phase']:<8} {text} · {speed} · {left} left")

    def progress(self, text: str) -> None:
        """Shows how far a long work is: on a terminal in place, else a line now and then."""
        if self._live:
            self._figures.plain = f"  {text}"
        elif time.perf_counter() - self._last >= PROGRESS_SECONDS:
            self._last = time.perf_counter()
            self.say(text)

    def say(self, message: Any) -> None:
        """Prints a line, or anything rich can print, above the live line."""
        if not self._quiet:
            self._console.print(message)

    def close(self) -> None:
        if self._live:
            self._live.stop()
