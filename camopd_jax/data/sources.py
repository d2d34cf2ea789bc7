"""Reads rows from JSONL or parquet files, or from a dataset of the Hugging Face hub.

A row is a dict with one of "messages" ([{"role", "content"}, ...]), "prompt" (text) and "prompt_ids" ([int, ...]). It
may have "answer", "response" or "response_ids"; other fields are kept. Rows of the datasets in columns.py are converted
to such rows.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camopd_jax.data import columns
from camopd_jax.data.columns import Row
from camopd_jax.errors import UserError

_FILES = (".jsonl", ".json", ".parquet")

RawRow = tuple[Any, str]  # a row before `checked`, and its file and line, for error messages


def read(source: str, split: str = "train", limit: int | None = None, field: str = "source") -> list[Row]:
    """The checked rows of a source.

    Args:
      source: .jsonl or .parquet files, separated by commas; or the name of a dataset, with configuration and revision
        if needed ("openai/gsm8k:main@cc7b047").
      split: of a dataset.
      limit: read only this many rows, the first ones; a dataset is then not downloaded completely.
      field: the flag or config field that names the source, for error messages.

    Raises:
      UserError: naming the file and line of a malformed row, or the field of a source that does not exist.
    """
    rows = stream(source, split, field, download=limit is None)
    return [checked(row, where) for row, where in itertools.islice(rows, limit)]


def read_jsonl(path: str | Path) -> list[Row]:
    """The checked rows of the JSONL file of the flag --input; blank lines are skipped."""
    return [checked(row, where) for row, where in _jsonl(_existing(path, "--input"))]


def stream(source: str, split: str, field: str, download: bool = False) -> Iterator[RawRow]:
    """The rows of a source one by one, unchecked.

    Args:
      download: whether to download a dataset completely before the first row, into the local cache.
    """
    for name in (part.strip() for part in source.split(",")):
        if name.endswith(".parquet"):
            yield from _parquet(_existing(name, field))
        elif name.endswith(_FILES):
            yield from _jsonl(_existing(name, field))
        else:
            rows = _load_dataset(name, split, field, streaming=not download)
            yield from ((row, f"{name}[{split}] row {i}") for i, row in enumerate(rows))


def is_file(source: str) -> bool:
    """Whether a source is a file, not a dataset of the hub."""
    return source.endswith(_FILES)


def _existing(path: str | Path, field: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{field}: no file {path}; give a .jsonl or .parquet file")
    return path


def _jsonl(path: Path) -> Iterator[RawRow]:
    empty = True
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, f"{path}:{number}"), f"{path}:{number}"
                    empty = False
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if empty:
        raise UserError(f"{path}: no rows; give at least one")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); every line must be one JSON object") from error


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((row, f"{path} row {i}") for i, row in enumerate(rows))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file; write it again") from error


# ---------------------------------------------------------------------------------------- the hub


def _load_dataset(name: str, split: str, field: str, streaming: bool) -> Any:
    import datasets  # slow to import, and only needed here

    path, configuration, revision = _parts(name)
    options = {"revision": revision} if revision else {}
    try:
        return datasets.load_dataset(path, configuration, split=split, streaming=streaming, **options)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise UserError(
            f"{field}: no dataset {name!r} with split {split!r} ({type(error).__name__}); check the name, or "
            "give a .jsonl or .parquet file"
        ) from error


def pinned(name: str, field: str) -> tuple[str, str | None]:
    """A dataset's name with its current revision after "@", and the licence in its dataset card.

    Raises:
      UserError: if the hub has no such dataset.
    """
    from huggingface_hub import HfApi  # slow to import, and only needed here

    path, configuration, revision = _parts(name)
    try:
        info = HfApi().dataset_info(path, revision=revision)
    except Exception as error:
        raise UserError(
            f"{field}: no dataset {path!r} on the hub ({type(error).__name__}); check the name, or give a .jsonl or "
            ".parquet file"
        ) from error
    licence = info.card_data.get("license") if info.card_data else None
    return f"{path}{':' + configuration if configuration else ''}@{info.sha}", licence


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """The path, configuration and revision of "path:configuration@revision"."""
    name, _, revision = name.partition("@")
    path, _, configuration = name.partition(":")
    return path, configuration or None, revision or None


# ------------------------------------------------------------------------------------------- rows


def checked(row: Any, where: str) -> Row:
    """Converts a row with columns.py, and checks that it has a prompt and fields of the right types.

    Args:
      where: the row's file and line, for error messages.

    Raises:
      UserError: for a row that is malformed or has no prompt.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
    row = columns.normalise({name: value for name, value in row.items() if value is not None})  # None: an empty cell
    if "messages" in row:
        _check_messages(row["messages"], where)
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


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "messages" must be a list of at least one message')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f'{where}: every message needs a text "role" and a text "content"')


def _check_ids(ids: Any, name: str, where: str) -> None:
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(f'{where}: "{name}" must be a list of token ids')
