"""Reads and writes JSONL files. If the process is killed, at most the last line of a growing file is incomplete."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from etils import epath

from camopd_jax.errors import UserError


def write_rows(path: str | epath.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one object per line to a temporary file beside `path`, then renames it to `path`.

    Raises:
      UserError: if the file cannot be written; an existing file at `path` is unchanged.
    """
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_file(path: str | epath.Path) -> Iterator[TextIO]:
    """A text file to write, which replaces `path` when it is complete.

    Raises:
      UserError: if it cannot be written; an existing file at `path` is unchanged.
    """
    path = epath.Path(path)
    part = path.parent / (path.name + ".part")
    try:
        with part.open("w") as file:
            yield file
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write ({error.strerror}); free disk space or choose another path") from error


def append_rows(path: epath.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends one object per line to a file. Numbers that are not finite become null.

    Raises:
      UserError: if the file cannot be written.
    """
    text = "".join(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" in str(path):  # object stores cannot append: gcsfs treats "a" like "w"
            path.write_text((path.read_text() if path.exists() else "") + text)
        else:
            with path.open("a") as stream:
                stream.write(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror}); free disk space and start the same command again"
        ) from error


def _finite(value: Any) -> Any:
    """The same JSON value, with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a growing file; empty if the file does not exist. An incomplete last line is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def drop_rows_after(path: epath.Path, steps_done: int) -> None:
    """Removes the rows after the first `steps_done` steps, so that a resumed run writes no row twice."""
    if path.exists():
        write_rows(path, (row for row in read_rows(path) if row["step"] < steps_done))
