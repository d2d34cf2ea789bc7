"""Files of JSON lines, of which a kill leaves none half-written but the last line of one that grows.

Lines end at "\n" and nowhere else: Unicode's other line separators may stand inside a JSON text.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from etils import epath

from camopd_jax.errors import UserError


def write_rows(path: str | epath.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one object a line to a part file beside `path`, then moves it there. Numbers not finite become null.

    Raises:
      UserError: if the file cannot be written; an existing file at `path` is unchanged.
    """
    with atomic_file(path) as file:
        for row in rows:
            file.write(to_line(row))


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of UTF-8. Half a surrogate pair stays an escape, and values that JSON lacks become text."""
    text = json.dumps(_finite(row), ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


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
        advice = "make it writable, free disk space or choose another path"
        raise UserError(f"{path}: cannot write ({error.strerror or error}); {advice}") from error


def append_rows(path: epath.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends one object per line to a file. Numbers that are not finite become null.

    Raises:
      UserError: if the file cannot be written.
    """
    added = "".join(map(to_line, rows)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" in str(path):  # object stores do not append: gcsfs takes "a" for "w"
            before = path.read_bytes() if path.exists() else b""
            path.write_bytes(before + _line_break(before[-1:]) + added)
        else:
            with open(path, "ab+") as stream:
                stream.seek(max(0, stream.tell() - 1))
                stream.write(_line_break(stream.read(1)) + added)
    except OSError as error:
        advice = "make it writable or free disk space, then start the same command again"
        raise UserError(f"{path}: cannot write ({error.strerror}); {advice}") from error


def _line_break(last: bytes) -> bytes:
    """What ends a file whose last byte this is: a row must not join a line that a kill cut."""
    return b"" if last in (b"", b"\n") else b"\n"


def _finite(value: Any) -> Any:
    """The same JSON value, with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a growing file; empty if the file does not exist. Damaged and incomplete lines are left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # also of a line that ends inside a character
            row = json.loads(line.decode())
            if isinstance(row, dict):
                rows.append(row)
    return rows


def drop_rows_after(path: epath.Path, steps_done: int) -> None:
    """Removes the rows after the first `steps_done` steps, so that a resumed run writes no row twice."""
    if path.exists():
        write_rows(path, (row for row in read_rows(path) if row["step"] < steps_done))
