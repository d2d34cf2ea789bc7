"""The rows of one file, unchecked: JSON lines, one JSON array, CSV or parquet. docs/inputs.md describes the forms."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from camopd_jax.errors import UserError
from camopd_jax.models.disk import LFS, is_lfs_pointer
from camopd_jax.runtime.paths import in_home

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".bz2", ".zst")  # after one of SUFFIXES that is text
KINDS = "a .jsonl, .json, .csv or .parquet file"

RawRow = tuple[Any, str]  # a row before `sources.checked`, and its file and line, for error messages


def suffix(name: str | Path) -> str:
    """What a file's name says about its form: its last suffix but that of a compression, in lower case.

    >>> suffix("data/Train.JSONL.gz")
    '.jsonl'
    """
    path = Path(str(name).lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def rows(name: str | Path, field: str) -> Iterator[RawRow]:
    """The rows of a file: of JSON, unless its name says otherwise.

    Args:
      field: the flag or config field that names the file, for error messages.

    Raises:
      UserError: naming the file, and the line where that is known, for what cannot be read; and for a file of no rows.
    """
    path = _existing(name, field)
    read: dict[str, Callable[[Path], Iterator[RawRow]]] = {
        ".csv": _csv,
        ".tsv": partial(_csv, delimiter="\t"),
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    empty = True
    try:
        if is_lfs_pointer(path):
            raise UserError(f"{path}: {LFS}")
        for row in read.get(suffix(path), _json)(path):
            yield row
            empty = False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    if empty:
        raise UserError(f"{path}: no rows; give at least one")


def _existing(name: str | Path, field: str) -> Path:
    """The path of a file that can be read."""
    if "://" in str(name):
        raise UserError(f"{field}: {name} is an address; copy the file to this machine, and give {KINDS}")
    path = in_home(name)
    if path.is_dir():
        raise UserError(f"{field}: {path} is a folder; give the files in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{field}: {path} is no regular file, which can be read again; save its rows in one")
    if not path.is_file():
        target = f" (a link to {os.readlink(path)}, which does not exist)" if path.is_symlink() else ""
        raise UserError(f"{field}: no file {path}{target}; give {KINDS}")
    return path


@contextlib.contextmanager
def _uncompressed(path: Path) -> Iterator[Iterable[bytes]]:
    r"""The lines of a file, which end at "\n"."""
    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow  # slow to import, and only needed here

    with pyarrow.input_stream(str(path), compression=pyarrow.Codec.detect(path.name.lower()).name) as stream:
        yield io.BufferedReader(stream)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""The lines of a text file with their numbers from 1. They end at "\n" and nowhere else."""
    with _uncompressed(path) as lines:
        for number, line in enumerate(lines, 1):
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


def _csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    """Of a CSV file whose first line names the columns. Cells are text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    reader = csv.reader((line for _, line in _lines(path)), strict=True, delimiter=delimiter)
    try:
        names = [name.strip() for name in next(reader, [])]
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
        advice = "end its lines with a line feed" if "new-line" in str(error) else "write quotes in a cell twice"
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); {advice}") from error


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        values = (row for batch in batches for row in batch.to_pylist())
        yield from ((row, f"{path} row {i}") for i, row in enumerate(values))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error}); write it again") from error


def _arrow(path: Path) -> Iterator[RawRow]:
    """Of a file that `save_to_disk` of `datasets` wrote."""
    import datasets  # slow to import, and only needed here

    try:
        yield from ((row, f"{path} row {i}") for i, row in enumerate(datasets.Dataset.from_file(str(path))))
    except (ValueError, TypeError) as error:  # pyarrow's errors among them
        raise UserError(f"{path}: not an arrow file of `datasets` ({error}); write it again") from error
