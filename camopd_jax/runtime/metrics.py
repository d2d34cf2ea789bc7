"""Writes the metrics of a run: JSONL files in its work directory, and figures at its trackers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows, write_rows
from camopd_jax.runtime.trackers import Trackers

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to the files of a work directory, and passes their figures to trackers. Only process 0 writes."""

    def __init__(self, workdir: epath.Path, trackers: Trackers | None = None) -> None:
        self._workdir, self._writes, self._trackers = workdir, is_primary(), trackers
        evaluations = workdir / "eval.jsonl"
        if self._writes and evaluations.exists():  # removes an incomplete last line before rows are appended
            write_rows(evaluations, read_rows(evaluations))

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
        """Adds a line to eval.jsonl, unless it is there; sends `value` to trackers under the name `figure`."""
        if not self._writes or row in read_rows(self._workdir / "eval.jsonl"):
            return
        self._append("eval.jsonl", [row])
        if self._trackers:
            self._trackers.log({f"{figure}/{row['model']}/{row['benchmark']}": value}, row["step"])

    def add_report(self, file: Path) -> None:
        """Uploads the report to trackers that take files."""
        if self._trackers:
            self._trackers.add_file(file)

    def close(self) -> None:
        if self._trackers:
            self._trackers.close()

    def _append(self, name: str, rows: Sequence[Row]) -> None:
        if self._writes and rows:
            append_rows(self._workdir / name, rows)

    def _add_scalars(self, prefix: str, row: Row) -> None:
        """Sends all figures of a row to the trackers."""
        if self._trackers:
            self._trackers.log({f"{prefix}/{name}": value for name, value in _figures(row)}, row["step"])


def _figures(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row by name; numbers of nested objects have a path as name."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and name != "step":
            yield prefix + name, value
