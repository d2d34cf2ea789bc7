"""Tokenised prompts of large files, which the next start reads instead of tokenising again.

They are in the user's cache folder, under a hash of everything that they depend on. A file there that is missing or
damaged costs time and nothing else.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from camopd_jax.config.schema import Stream
from camopd_jax.data import dates, sources
from camopd_jax.data.templates import Reader, Tokenizers
from camopd_jax.models.checksums import sha256
from camopd_jax.runtime.paths import cache_folder, in_home

SECONDS = 5.0  # what takes less time to tokenise is not kept
KEPT = 8  # files, those used last

Row = tuple[int, list[int], list[int]]  # number in the source, and the token ids for student and teacher


def key(stream: Stream, tokenizers: Tokenizers, cap: int) -> str | None:
    """A hash of the files, the tokenizers, the templates and this code; None: some of it has no digest."""
    names = sources.names(stream.source)
    readers = [_reader(tokenizers.student), _reader(tokenizers.teacher)]
    if None in readers or not all(in_home(name).is_file() for name in names):
        return None
    code = [sha256(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    rows = [(Path(name).suffix, sha256(in_home(name))) for name in names]
    templates = [dates.with_date(repr(template)) for template in (stream.template, stream.teacher_template)]
    parts = [transformers.__version__, code, rows, stream.split, stream.limit, stream.too_long, cap, templates, readers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _reader(reader: Reader) -> list[Any] | None:
    """What the token ids of a text depend on; None for a tokenizer that is written in Python."""
    tokenizer: Any = reader.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = dates.with_date(str(tokenizer.chat_template))
    settings = {name: str(value) for name, value in sorted(tokenizer.init_kwargs.items())}
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return [type(tokenizer).__name__, digest, template, settings, reader.vocab_size]


def read(name: str) -> tuple[list[Row], dict[str, int]] | None:
    """The rows and counts that `write` kept; None: there are none."""
    file = cache_folder("prompts") / f"{name}.npz"
    try:
        with np.load(file) as arrays:
            index, counts = arrays["index"].tolist(), json.loads(str(arrays["counts"]))
            student = _split(arrays["student"], arrays["student_lengths"])
            teacher = _split(arrays["teacher"], arrays["teacher_lengths"]) if "teacher" in arrays else student
        os.utime(file)
        return list(zip(index, student, teacher, strict=True)), counts
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    values, ends = ids.tolist(), [0, *np.cumsum(lengths).tolist()]
    if ends[-1] != len(values):
        raise ValueError("cut")
    return [values[start:end] for start, end in pairwise(ends)]


def write(name: str, rows: Sequence[Row], counts: dict[str, int]) -> None:
    """Keeps rows and counts, and removes the files that were not used for longest."""
    arrays: dict[str, Any] = {"index": np.asarray([row[0] for row in rows], np.int32), "counts": json.dumps(counts)}
    arrays |= _joined("student", (row[1] for row in rows))
    if any(student is not teacher for _, student, teacher in rows):
        arrays |= _joined("teacher", (row[2] for row in rows))
    folder = cache_folder("prompts")
    part = folder / f"{name}.{os.getpid()}.part"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                np.savez(stream, **arrays)
            part.replace(folder / f"{name}.npz")
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)


def _joined(side: str, rows: Iterable[list[int]]) -> dict[str, np.ndarray]:
    arrays = [np.asarray(ids, np.int32) for ids in rows]
    lengths = np.asarray([len(ids) for ids in arrays], np.int32)
    return {side: np.concatenate([np.zeros(0, np.int32), *arrays]), f"{side}_lengths": lengths}
