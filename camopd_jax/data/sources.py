"""Rows of prompts from JSONL or parquet files, or from a `datasets` dataset.

A row is a dict with one of "messages" ([{"role", "content"}, ...]), "prompt" (text) and "prompt_ids"
([int, ...]); commonly "answer", "response" or "response_ids"; whatever else it holds is kept. Rows with the columns
of a dataset that columns.py knows become such rows.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camopd_jax.data import columns
from camopd_jax.errors import UserError

Row = dict[str, Any]

_FILES = (".jsonl", ".json", ".parquet")


def read(source: str, split: str = "train", limit: int | None = None, field: str = "source") -> list[Row]:
    """The rows of a source.

    Args:
      source: .jsonl or .parquet file, several with commas between them; else the name of a dataset, with its
        configuration behind a colon where it has several ("openai/gsm8k:main").
      split: of a dataset.
      limit: only the first rows.
      field: how errors name the source.

    Raises:
      UserError: naming the file and line of a malformed row, or the field of a source that is not there.
    """
    rows: list[Row] = []
    for name in (part.strip() for part in source.split(",")):
        if name.endswith(".parquet"):
            rows += _read_parquet(_existing(name, field))
        elif name.endswith(_FILES):
            rows += read_jsonl(_existing(name, field))
        else:
            rows += _read_dataset(name, split, limit, field)
    return rows if limit is None else rows[:limit]


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of a JSONL file, each checked; blank lines are passed over."""
    path = _existing(path, "--input")
    rows = []
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_checked(_parsed(line, f"{path}:{number}"), f"{path}:{number}"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if not rows:
        raise UserError(f"{path}: no rows; give at least one")
    return rows


def _existing(path: str | Path, field: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{field}: no file {path}; give a .jsonl or .parquet file")
    return path


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); every line must be one JSON object") from error


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file; write it again") from error
    return [_checked(row, f"{path} row {i}") for i, row in enumerate(rows)]


def _read_dataset(name: str, split: str, limit: int | None, field: str) -> list[Row]:
    rows = stream_dataset(name, split, field) if limit is not None else _load_dataset(name, split, field)
    return [_checked(row, f"{name}[{split}] row {i}") for i, row in enumerate(itertools.islice(rows, limit))]


def stream_dataset(name: str, split: str, field: str) -> Iterator[Row]:
    """The raw rows of a dataset as they come, never the whole of it."""
    yield from _load_dataset(name, split, field, streaming=True)


def _load_dataset(name: str, split: str, field: str, **options: Any) -> Any:
    import datasets  # slow to import, and only needed here

    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None, split=split, **options)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise UserError(
            f"{field}: no dataset {name!r} with split {split!r} ({type(error).__name__}); check the name, or "
            "give a .jsonl or .parquet file"
        ) from error


def _checked(row: Any, where: str) -> Row:
    """The row, if it is one; parquet and datasets leave None where a row has no value."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
    row = columns.normalise({name: value for name, value in row.items() if value is not None})
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise UserError(f'{where}: "messages" must be a list of at least one message')
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise UserError(f'{where}: every message needs a text "role" and a text "content"')
    elif "prompt_ids" in row:
        _check_ids(row["prompt_ids"], "prompt_ids", where)
        if not row["prompt_ids"]:
            raise UserError(f'{where}: "prompt_ids" is empty; a prompt needs at least one token')
    elif not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UserError(f'{where}: no prompt; give "messages", "prompt" or "prompt_ids"')
    if "response_ids" in row:
        _check_ids(row["response_ids"], "response_ids", where)
    if not isinstance(row.get("response", ""), str):
        raise UserError(f'{where}: "response" must be text')
    return row


def _check_ids(ids: Any, name: str, where: str) -> None:
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(f'{where}: "{name}" must be a list of token ids')
