"""Writes the metrics of a run: JSONL files and TensorBoard events in its work directory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows, write_rows

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to the files of a work directory. Only process 0 writes."""

    def __init__(self, workdir: epath.Path, tensorboard: bool) -> None:
        self._workdir, self._writes = workdir, is_primary()
        evaluations = workdir / "eval.jsonl"
        if self._writes and evaluations.exists():  # removes an incomplete last line before rows are appended
            write_rows(evaluations, read_rows(evaluations))
        self._events = None
        if tensorboard and self._writes:
            from tensorboardX import SummaryWriter  # slow to import

            self._events = SummaryWriter(str(workdir / "tensorboard"), flush_secs=10)

    def add_step(self, row: Row) -> None:
        """Adds a line to metrics.jsonl. Numbers that are not finite become null."""
        self._append("metrics.jsonl", [row])
        self._add_scalars(row["phase"], row)

    def add_samples(self, rows: Sequence[Row]) -> None:
        self._append("samples.jsonl", rows)

    def add_selection(self, rows: Sequence[Row]) -> None:
        self._append("selection.jsonl", rows)

    def add_diagnosis(self, row: Row) -> None:
        """Adds a line to diagnostics.jsonl."""
        self._append("diagnostics.jsonl", [row])
        self._add_scalars("diagnostics", row)

    def diagnosed_steps(self) -> set[int]:
        """The steps with a line in diagnostics.jsonl."""
        return set(broadcast(lambda: [row["step"] for row in read_rows(self._workdir / "diagnostics.jsonl")]))

    def add_evaluation(self, row: Row, figure: str, value: float) -> None:
        """Adds a line to eval.jsonl, unless it is there; adds `value` to TensorBoard under the name `figure`."""
        if not self._writes or row in read_rows(self._workdir / "eval.jsonl"):
            return
        self._append("eval.jsonl", [row])
        if self._events:
            self._events.add_scalar(f"{figure}/{row['model']}/{row['benchmark']}", value, row["step"])
            self._events.flush()

    def close(self) -> None:
        if self._events:
            self._events.close()

    def _append(self, name: str, rows: Sequence[Row]) -> None:
        if self._writes and rows:
            append_rows(self._workdir / name, rows)

    def _add_scalars(self, prefix: str, row: Row) -> None:
        """Adds all figures of a row to TensorBoard."""
        if self._events:
            for name, value in _figures(row):
                self._events.add_scalar(f"{prefix}/{name}", value, row["step"])
            self._events.flush()


def _figures(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row by name; numbers of nested objects have a path as name."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and name != "step":
            yield prefix + name, value
