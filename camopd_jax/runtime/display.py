"""Prints the progress of a run: two live lines on a terminal, else a plain line every few seconds."""

import atexit
import datetime
import math
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from camopd_jax.runtime.distributed import is_primary

STEP_SECONDS = 2.0  # minimum time between two plain lines of steps
PROGRESS_SECONDS = 15.0  # the same for other work
COLOURS = ("cyan", "magenta", "green", "blue", "yellow", "red")  # of phases, in the order in which they first appear


class Display:
    """Shows steps, the progress of other long work, and messages. Only process 0 prints.

    If the environment variable NO_COLOR is set, there are no colours.
    """

    def __init__(self, total: int, start: int) -> None:
        """For a run of `total` steps of which `start` are done."""
        on_terminal = sys.stdout.isatty()
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not on_terminal)
        self._prints = is_primary()
        self._total, self._start, self._started = total, start, time.perf_counter()
        self._last_line = -math.inf  # when the last plain line was printed
        self._live = None
        if on_terminal and self._console.is_interactive and self._prints:
            self._live = _LiveLines(self._console, total, start)

    def step(self, row: dict[str, Any]) -> None:
        """Shows a step's row of metrics."""
        done, speed = row["step"] + 1, f"{row['tokens_per_second']:.0f} tok/s"
        if self._live:
            self._live.step(row["phase"], done, speed)
            self._live.figures(_figures(row))
        elif done == self._total or row["skipped"] or self._waited(STEP_SECONDS):
            left = (time.perf_counter() - self._started) / max(1, done - self._start) * (self._total - done)
            time_left = datetime.timedelta(seconds=round(left))
            line = f"step {done}/{self._total} {row['phase']:<8} {_figures(row)} · {speed} · {time_left} left"
            self._plain_line(line)

    def progress(self, text: str) -> None:
        """Shows the progress of other long work: in place on a terminal, else a line every few seconds."""
        if self._live:
            self._live.figures(text)
        elif self._waited(PROGRESS_SECONDS):
            self._plain_line(text)

    def print(self, message: Any) -> None:
        """Prints a line or another rich object above the live lines."""
        if self._prints:
            self._console.print(message)

    def close(self) -> None:
        """Ends the live lines; messages can still be printed."""
        if self._live:
            self._live.close()

    def _waited(self, seconds: float) -> bool:
        return time.perf_counter() - self._last_line >= seconds

    def _plain_line(self, text: str) -> None:
        self._last_line = time.perf_counter()
        self.print(text)


class _LiveLines:
    """A progress bar with a line of figures below it, updated in place."""

    def __init__(self, console: Console, total: int, start: int) -> None:
        self._bar = Progress(
            SpinnerColumn(style="dim"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24, complete_style="default", finished_style="default"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self._task = self._bar.add_task("starting", total=total, completed=start, speed="")
        self._text = Text(style="dim", no_wrap=True, overflow="ellipsis")
        self._colours: dict[str, str] = {}
        self._live = Live(Group(self._bar, self._text), console=console, refresh_per_second=8)
        self._live.start()
        atexit.register(self._live.stop)  # restores the cursor after an error

    def step(self, phase: str, done: int, speed: str) -> None:
        colour = self._colours.setdefault(phase, COLOURS[len(self._colours) % len(COLOURS)])
        self._bar.update(self._task, description=f"[{colour}]{phase:<8}[/]", completed=done, speed=speed)

    def figures(self, text: str) -> None:
        self._text.plain = f"  {text}"

    def close(self) -> None:
        self._live.stop()


def _figures(row: dict[str, Any]) -> str:
    """The figures shown for a step."""
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
    return " · ".join(figures)
