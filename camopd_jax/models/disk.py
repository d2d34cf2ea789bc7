"""Finds the tensors of a Hugging Face folder in its safetensors files. Only the headers are read."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from camopd_jax.errors import UserError
from camopd_jax.models import formats
from camopd_jax.runtime.paths import in_home

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
BLOCKS, SCALES = "_blocks", "_scales"  # ends of the names of the two tensors that an MXFP4 tensor consists of
LFS = "a pointer of Git LFS: run `git lfs pull`"
_TABLES = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_URL = re.compile(r"https?://(?:huggingface|hf)\.co/([^/]+/[^/?#]+)")
CHECKPOINT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # the files of a checkpoint to download


@dataclass(frozen=True)
class Tensor:
    """The location of a tensor on disk."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        """The tensor as a memory map: only the parts that are used are read from disk."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def find_folder(name: str, field: str, files: Sequence[str] = CHECKPOINT, revision: str | None = None) -> Path:
    """The folder `name`, or the local copy of a repository of the Hugging Face hub.

    Args:
      field: the flag or field that holds the name, for error messages.
      files: patterns of the files to download.
      revision: of the repository; None: its main branch.

    Raises:
      UserError: if there is no such folder and the hub has no such repository.
    """
    path = in_home(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{field}: {name} is a file; give a Hugging Face folder, such as the one that the file is in")
    if url := _HUB_URL.match(name):
        raise UserError(f"{field}: {name} is a web page; give the hub name {url[1]}")
    if "://" in name:
        raise UserError(f"{field}: {name} is a URL; give the path of a local folder, or a hub name like Qwen/Qwen3-8B")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{field}: no folder {name}; give a Hugging Face folder or a hub name like Qwen/Qwen3-8B")
    try:
        return _from_hub(name, tuple(files), revision)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise UserError(
            f"{field}: no folder {name}, and it cannot be fetched from the hub ({type(error).__name__}); "
            "check the name, log in with `hf auth login`, or give a local folder"
        ) from error


def hub_revision(folder: Path) -> str | None:
    """The revision of a folder that `find_folder` took from the hub; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


@functools.cache
def _from_hub(name: str, files: tuple[str, ...], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, read from the file headers. Rotary tables of old checkpoints are left out.

    As in transformers, a single file takes precedence over an index of several files.

    Raises:
      UserError: if there are no safetensors (pickles are refused), if a file is missing, truncated or damaged, or if
        the index names a file outside the folder.
    """
    if (folder / SINGLE).exists():
        on_disk = read_header(folder / SINGLE)
    elif (folder / INDEX).exists():
        on_disk = _indexed(folder)
    else:
        if (folder / SINGLE).is_symlink():
            raise UserError(f"{folder / SINGLE} is a link to a file that does not exist; fetch the checkpoint again")
        instead = formats.advice(folder) or "give a Hugging Face folder with safetensors"
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; {instead}")
    return {name: t for name, t in on_disk.items() if not name.endswith(_TABLES)}


def stale_index(folder: Path) -> str | None:
    """A warning, if a folder has a single file and an index of other files, which is not read; else None."""
    if not (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return None
    try:
        others = sorted(set(_weight_map(folder / INDEX).values()) - {SINGLE})
    except UserError:  # what is not read need not be sound
        return None
    if not others:
        return None
    return f"{folder}: {SINGLE} is read; {INDEX} and its files ({others[0]}, {len(others)} in all) are not: delete one"


def _indexed(folder: Path) -> dict[str, Tensor]:
    """All tensors of the files that the index names."""
    index, on_disk = folder / INDEX, dict[str, Tensor]()
    weight_map = _weight_map(index)
    for name in sorted(set(weight_map.values())):
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing, though {INDEX} names it; fetch the checkpoint again")
        of_file = read_header(folder / name)
        twice = on_disk.keys() & of_file.keys()
        if twice:
            raise UserError(f"{folder / name}: tensor {min(twice)} is in another file too; fetch the checkpoint again")
        on_disk |= of_file
    if lost := weight_map.keys() - on_disk.keys():
        raise UserError(f"{index}: tensor {min(lost)} is in none of the files; fetch the checkpoint again")
    return on_disk


def _weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor, as the index has it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: field weight_map is missing; fetch the checkpoint again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map names {name!r}; only .safetensors files beside it are read")
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: 8 bytes of length, a JSON header, then the bytes that it describes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _entry(file, name, entry, 8 + length, size) for name, entry in entries.items()}
        with safe_open(file, "numpy"):  # checks the rest: no overlap, no gap, nothing behind the tensors
            return tensors
    except OSError as error:
        raise UserError(f"{file}: cannot read it ({error.strerror}); fetch the checkpoint again") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        advice = LFS if is_lfs_pointer(file) else f"{error}; fetch the checkpoint again"
        raise UserError(f"{file} is not a safetensors file: {advice}") from error


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of a large file."""
    return file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")


def _entry(file: Path, name: str, entry: dict[str, Any], data: int, size: int) -> Tensor:
    """One tensor of a header. `data`: offset of the first tensor in the file; `size`: of the file; both in bytes."""
    start, stop = entry["data_offsets"]
    dtype = np.dtype(np.uint8) if entry["dtype"] == "U8" and name.endswith((BLOCKS, SCALES)) else None
    dtype = dtype or _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UserError(
            f"{file}: tensor {name} has dtype {entry['dtype']}; only {', '.join(_DTYPES)} are read "
            "(quantised checkpoints: give the original)"
        )
    shape = tuple(entry["shape"])
    if stop - start != dtype.itemsize * int(np.prod(shape)) or start < 0:
        raise ValueError(f"tensor {name} has {stop - start} bytes for shape {list(shape)}")
    if data + stop > size:
        raise UserError(f"{file} is cut short at tensor {name}; fetch the checkpoint again")
    return Tensor(file, dtype, shape, data + start)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      UserError: if the file is missing or has other contents.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside, instead = formats.checkpoint_inside(path.parent), formats.advice(path.parent)
        advice = instead or (f"give the folder {inside}" if inside else "give a Hugging Face folder")
        raise UserError(f"{path} is missing; {advice}") from None
    except (ValueError, OSError, RecursionError) as error:
        pointer = path.is_file() and is_lfs_pointer(path)
        raise UserError(
            f"{path}: not readable as JSON ({LFS if pointer else error}); fetch the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object; fetch the checkpoint again")
    return value
