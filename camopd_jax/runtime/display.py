"""Prints the steps of a run: two live lines on a terminal, else a plain line every few seconds."""

import atexit
import datetime
import math
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from camopd_jax.runtime import progress
from camopd_jax.runtime.distributed import is_primary

STEP_SECONDS = 2.0  # minimum time between two plain lines of steps
COLOURS = ("cyan", "magenta", "green", "blue", "yellow", "red")  # of phases, in the order in which they first appear


class Display:
    """Shows steps and messages; during other work, the second live line shows its progress. Only process 0 prints.

    If the environment variable NO_COLOR is set, there are no colours.
    """

    def __init__(self, total: int, start: int) -> None:
        """For a run of `total` steps of which `start` are done; 0: only for messages."""
        self._console = progress.console()
        self._prints = is_primary()
        self._total, self._start, self._started = total, start, time.perf_counter()
        self._compiled = progress.compilations.seconds  # until now
        self._last_line = -math.inf  # when the last plain line of a step was printed
        self._live = None
        if total and self._console.is_terminal and self._console.is_interactive and self._prints:
            progress.show_in(None)
            self._live = _LiveLines(self._console, total, start)
            progress.show_in(self._live.progress)

    def step(self, row: dict[str, Any]) -> None:
        """Shows a step's row of metrics."""
        done, speed = row["step"] + 1, f"{row['tokens_per_second']:.0f} tok/s"
        if self._live:
            self._live.step(row["phase"], done, speed, _figures(row))
        elif done == self._total or row["skipped"] or time.perf_counter() - self._last_line >= STEP_SECONDS:
            self._last_line = time.perf_counter()
            time_left = datetime.timedelta(seconds=round(self._seconds_left(done)))
            self.print(f"step {done}/{self._total} {row['phase']:<8} {_figures(row)} · {speed} · {time_left} left")

    def _seconds_left(self, done: int) -> float:
        """Without the compilation of programs, most of which is over after the first steps."""
        compiling = progress.compilations.seconds - self._compiled
        seconds = time.perf_counter() - self._started - compiling
        return max(0.0, seconds) / max(1, done - self._start) * (self._total - done)

    def print(self, message: Any) -> None:
        """Prints a line or another rich object above the live lines."""
        if self._prints:
            self._console.print(message)
            progress.printed()

    def close(self) -> None:
        """Ends the live lines; messages can still be printed."""
        if self._live:
            progress.show_in(None)
            self._live.close()


class _LiveLines:
    """A progress bar with a line of figures or of progress below it, updated in place."""

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
        self._figures = ""
        self._colours: dict[str, str] = {}
        self._live = Live(Group(self._bar, self._text), console=console, refresh_per_second=8)
        self._live.start()
        atexit.register(self._live.stop)  # restores the cursor after an error

    def step(self, phase: str, done: int, speed: str, figures: str) -> None:
        colour = self._colours.setdefault(phase, COLOURS[len(self._colours) % len(COLOURS)])
        self._bar.update(self._task, description=f"[{colour}]{phase:<8}[/]", completed=done, speed=speed)
        self._figures = figures
        self.progress("")

    def progress(self, text: str) -> None:
        """Shows progress in place of the last step's figures; "": the figures again."""
        self._text.plain = f"  {text or self._figures}"

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
