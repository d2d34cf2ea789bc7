"""The rows of one file, unchecked: JSON lines, one JSON array, CSV or parquet. docs/inputs.md describes the forms."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camopd_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KINDS = "a .jsonl, .json, .csv or .parquet file"

RawRow = tuple[Any, str]  # a row before `sources.checked`, and its file and line, for error messages


def rows(path: str | Path, field: str) -> Iterator[RawRow]:
    """The rows of a file: of JSON, unless its name says CSV or parquet.

    Args:
      field: the flag or config field that names the file, for error messages.

    Raises:
      UserError: naming the file, and the line where that is known, for what cannot be read; and for a file of no rows.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{field}: no file {path}; give {KINDS}")
    read = {".csv": _csv, ".parquet": _parquet}.get(path.suffix, _json)
    empty = True
    try:
        for row in read(path):
            yield row
            empty = False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    if empty:
        raise UserError(f"{path}: no rows; give at least one")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""The lines of a text file with their numbers from 1. They end at "\n" and nowhere else."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig")  # some programs begin a file with a byte order mark
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def _json(path: Path) -> Iterator[RawRow]:
    """Of JSON lines, blank ones skipped; or of one array, which a file is that begins with a bracket."""
    lines = _lines(path)
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            elements = _parsed(line + "".join(rest for _, rest in lines), str(path))
            yield from ((element, f"{path} row {i}") for i, element in enumerate(elements))
            return
        first = False
        yield _parsed(line, f"{path}:{number}"), f"{path}:{number}"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error}); every line must be one JSON object, or the file one array of objects"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: its JSON is nested too deep; flatten it") from error
    except ValueError as error:  # Python converts whole numbers of up to 4,300 digits
        raise UserError(f"{where}: a whole number has too many digits; write it as text") from error


def _csv(path: Path) -> Iterator[RawRow]:
    """Of a CSV file whose first line names the columns. Cells are text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise UserError(f"{path}:1: two columns have the same name; rename one of {', '.join(names)}")
        number = reader.line_num + 1  # a cell may hold line breaks: where the next row begins
        for cells in reader:
            where, number = f"{path}:{number}", reader.line_num + 1
            if cells and len(cells) != len(names):
                raise UserError(
                    f"{where}: {len(cells)} cells, but {len(names)} columns in the first line; put quotes around a "
                    "cell with a comma or a line break"
                )
            if any(cells):  # else a blank line
                yield {name: cell for name, cell in zip(names, cells, strict=True) if cell}, where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); write quotes in a cell twice") from error


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        values = (row for batch in batches for row in batch.to_pylist())
        yield from ((row, f"{path} row {i}") for i, row in enumerate(values))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error}); write it again") from error
