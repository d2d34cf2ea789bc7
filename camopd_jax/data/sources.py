"""Checked rows of prompts from files, or from a dataset of the Hugging Face hub.

A row is a dict with one of "messages" ([{"role", "content"}, ...]), "prompt" (text) and "prompt_ids" ([int, ...]);
commonly "answer", "response" or "response_ids"; its other fields are kept. Rows in the other forms that columns.py and
messages.py know become such rows.
"""

import contextlib
import glob
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from camopd_jax.data import columns, files
from camopd_jax.data.columns import Row
from camopd_jax.data.files import KINDS, RawRow
from camopd_jax.errors import UserError
from camopd_jax.runtime.paths import in_home
from camopd_jax.runtime.progress import work

LocatedRow = tuple[Row, str]  # a checked row, and its file and line

_LEVELS = 100  # of lists and objects inside each other, which Python's own limit leaves room for
_LARGEST_ID = 2**31 - 1
HUB_SECONDS = 10  # for the hub's first answer


def read(source: str, split: str = "train", limit: int | None = None, field: str = "source") -> list[Row]:
    """The checked rows of a source.

    Args:
      source: a file, several with commas between them, or a pattern with * that matches files; else a folder, or the
        name of a dataset, with its configuration behind a colon and its revision behind an at sign if wanted
        ("openai/gsm8k:main@cc7b047").
      split: of a dataset.
      limit: read only this many rows, the first ones; a dataset is then not downloaded completely.
      field: the flag or config field that names the source, for error messages.

    Raises:
      UserError: naming the file and line of a malformed row, or the field of a source that does not exist.
    """
    return [row for row, _ in read_located(source, split, limit, field)]


def read_located(
    source: str, split: str = "train", limit: int | None = None, field: str = "source"
) -> list[LocatedRow]:
    """As `read`, each row with its file and line, or its number in a dataset, parquet file or JSON array."""
    rows = itertools.islice(stream(source, split, field, download=limit is None), limit)
    return _located(rows, source)


def read_file(path: str | Path, field: str) -> list[LocatedRow]:
    """As `read_located`, of one file with any name."""
    return _located(files.rows(path, field), str(path))


def _located(rows: Iterable[RawRow], source: str) -> list[LocatedRow]:
    located = []
    with work(f"reading {source}", unit="rows") as reading:
        for row, where in rows:
            located.append((checked(row, where), where))
            reading.add()
    return located


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts a row's file and line before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def stream(source: str, split: str, field: str, download: bool = False) -> Iterator[RawRow]:
    """The rows of a source one by one, unchecked.

    Args:
      download: whether to download a dataset completely before the first row, into the local cache.
    """
    for name in names(source):
        if is_file(name):
            yield from files.rows(name, field)
        else:
            yield from _dataset(name, split, field, download)


def names(source: str) -> list[str]:
    """The files or datasets of a source, with the files that a pattern matches, sorted."""
    if in_home(source).is_file():  # its name may contain a comma
        return [source]
    parts = [name.strip() for name in source.split(",") if name.strip()]
    return [name for part in parts for name in _matches(part)] or [source]


def _matches(name: str) -> list[str]:
    """The files that a pattern matches; of another name, or if there are none, the name itself."""
    if not re.search(r"[*?[]", name) or in_home(name).exists():
        return [name]
    return sorted(glob.glob(str(in_home(name)))) or [name]


def is_file(name: str) -> bool:
    """Whether a name is that of a file; else it is a folder or a dataset of the hub."""
    return files.suffix(name) in files.SUFFIXES or in_home(name).is_file()


# ---------------------------------------------------------------------------------------- the hub


def _dataset(name: str, split: str, field: str, download: bool) -> Iterator[RawRow]:
    where = f"{name}[{split}] row"
    number = -1
    try:
        for number, row in enumerate(_load_dataset(name, split, field, streaming=not download)):
            yield row, f"{where} {number}"
    except UserError:
        raise
    except Exception as error:  # the hub's client, pyarrow and decoders of a column raise their own
        raise UserError(f"{where} {number + 1}: cannot be read ({type(error).__name__}: {error}); try again") from error


def _load_dataset(name: str, split: str, field: str, streaming: bool) -> Any:
    import datasets  # slow to import, and only needed here

    folder = in_home(name)
    path, configuration, revision = (str(folder), None, None) if folder.is_dir() else _parts(name, field)
    options = {"revision": revision} if revision else {}
    offline = not folder.is_dir() and (datasets.config.HF_HUB_OFFLINE or not _hub_answers(path))
    datasets.config.HF_HUB_OFFLINE |= offline  # without a connection it would retry for half a minute
    try:
        if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        with work(f"loading {name}"):
            return datasets.load_dataset(path, configuration, split=split, streaming=streaming, **options)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        if offline:
            raise UserError(
                f"{field}: no dataset {name!r} with split {split!r} in the local cache, and no connection to the hub; "
                f"check the network and HF_HUB_OFFLINE, or give {KINDS}"
            ) from error
        raise UserError(
            f"{field}: no dataset {name!r} with split {split!r} ({type(error).__name__}); check the name, or "
            f"give {KINDS}"
        ) from error


def _hub_answers(path: str) -> bool:
    """Whether the hub answers a request, if only that it has no such dataset; without retries."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(path, timeout=HUB_SECONDS)
    except Exception as error:  # the errors of answers have the response, those of connections have none
        return getattr(error, "response", None) is not None
    return True


def pinned(name: str, field: str) -> tuple[str, str | None]:
    """A dataset's name with its current revision after "@", and the licence in its dataset card.

    Raises:
      UserError: if the hub has no such dataset.
    """
    from huggingface_hub import HfApi  # slow to import, and only needed here

    path, configuration, revision = _parts(name, field)
    try:
        info = HfApi().dataset_info(path, revision=revision)
    except Exception as error:
        raise UserError(
            f"{field}: no dataset {path!r} on the hub ({type(error).__name__}); check the name, or give {KINDS}"
        ) from error
    licence = info.card_data.get("license") if info.card_data else None
    return f"{path}{':' + configuration if configuration else ''}@{info.sha}", licence


def _parts(name: str, field: str) -> tuple[str, str | None, str | None]:
    """The path, configuration and revision of "path:configuration@revision".

    Raises:
      UserError: if it cannot be the name of a dataset.
    """
    if "://" in name:
        raise UserError(f"{field}: {name} is an address; give the name of a dataset (OWNER/NAME), or {KINDS}")
    base, _, revision = name.partition("@")
    path, _, configuration = base.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise UserError(f"{field}: no file or folder {name!r}; give {KINDS}, or the name of a dataset (OWNER/NAME)")
    return path, configuration or None, revision or None


# ------------------------------------------------------------------------------------------- rows


def checked(row: Any, where: str) -> Row:
    """Converts a row with columns.py, and checks that it has a prompt and fields of the right types.

    Null fields are left out, and so are numbers that are not finite, which JSON lacks.

    Args:
      where: the row's file and line, for error messages.

    Raises:
      UserError: for a row that is malformed or has no prompt.
    """
    with naming(where):
        if not isinstance(row, dict):
            raise UserError(f"a row must be a JSON object, this is {type(row).__name__}")
        _check_values(row, _LEVELS)
        row = columns.normalise({name: value for name, value in row.items() if not _is_null(value)})
        _check_prompt(row)
        if "response_ids" in row:
            _check_ids(row["response_ids"], "response_ids")
        if not isinstance(row.get("response", ""), str):
            raise UserError('"response" must be text')
        return row


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _check_values(value: Any, levels: int) -> None:
    """Finds what could be read, but not written again, or not tokenised."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{value[error.start]!r} is half of a surrogate pair, which is no character; remove it or add the other"
            ) from error
    elif isinstance(value, dict | list):
        if not levels:
            raise UserError(f"lists and objects are nested more than {_LEVELS} deep; flatten them")
        for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            _check_values(inner, levels - 1)


def _check_prompt(row: Row) -> None:
    if "messages" in row:
        return  # `normalise` has checked them
    if not row.keys() & {"prompt", "prompt_ids"}:
        fields = ", ".join(list(row)[:8]) or "none"
        raise UserError(f'no prompt; give "messages", "prompt" or "prompt_ids" (the row has the fields {fields})')
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise UserError('no prompt; "prompt" must be text or a list of messages, and not empty')
    else:
        _check_ids(row["prompt_ids"], "prompt_ids")
        if not row["prompt_ids"]:
            raise UserError('"prompt_ids" is empty; a prompt needs at least one token')


def _check_ids(ids: Any, name: str) -> None:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i <= _LARGEST_ID for i in ids):
        raise UserError(f'"{name}" must be a list of token ids')
