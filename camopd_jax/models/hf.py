"""Reads the safetensors of Hugging Face folders directly onto the mesh, and writes such folders."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors.numpy import save_file

from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.weights import MODULE_NAMES, check_rows_cover, leaf_of, shardings, table, tree_of
from camopd_jax.types import Params

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD, _EMBEDDING = (f"{MODULE_NAMES[name]}.weight" for name in ("head", "embedding"))


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


# --------------------------------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json in a folder, or the given file.

    Raises:
      UserError: if it is missing, is not JSON, or needs code from the checkpoint.
    """
    file = folder if folder.is_file() else folder / "config.json"
    config = _read_json(file)
    if "auto_map" in config:
        raise UserError(
            f"{file}: auto_map asks for code from the checkpoint, which is never run; "
            "use a checkpoint of a built-in architecture"
        )
    return config


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """Reads the parameters onto the mesh, each shard directly from disk.

    The host has one shard of one stacked parameter in memory at a time.

    Raises:
      UserError: as `matching`.
    """
    on_disk = matching(folder, config)
    sharding_of = shardings(config, mesh)
    leaves = {}
    for row in table(config):
        views = [row.from_hf(on_disk[name].map()) for name in row.names(config.num_layers)]
        shard = partial(_shard, views, row.stacked, dtype)
        leaf = jax.make_array_from_callback(row.shape(config.num_layers), leaf_of(sharding_of, row.path), shard)
        leaves[row.path] = jax.block_until_ready(leaf)  # else this shard is in host memory while the next is read
    return tree_of(leaves)


def _shard(views: list[np.ndarray], stacked: bool, dtype: str, index: tuple[slice, ...] | None) -> np.ndarray:
    """One device's shard of a parameter, read from the tensors that it consists of.

    Args:
      index: of the shard. JAX's type allows None, but it does not occur.
    """
    assert index is not None
    wanted = [view[index[1:]] for view in views[index[0]]] if stacked else [views[0][index]]
    out = np.empty((len(wanted), *wanted[0].shape), dtype)
    for layer, view in zip(out, wanted, strict=True):
        layer[...] = view
    return out if stacked else out[0]


def matching(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder, checked against a model config.

    Raises:
      UserError: for missing or additional tensors and wrong shapes, and as `tensors`.
    """
    on_disk = tensors(folder)
    shapes = {name: row.hf_shape for row in table(config) for name in row.names(config.num_layers)}
    if config.tied_head and _HEAD in on_disk:
        _check_tied(on_disk, folder)
        shapes[_HEAD] = (config.vocab_size, config.hidden_size)
    missing, extra = sorted(shapes.keys() - on_disk.keys()), sorted(on_disk.keys() - shapes.keys())
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); fetch the checkpoint again")
    if extra:
        raise UserError(
            f"{folder}: tensor {extra[0]} ({len(extra)} in all) has no place in a model of this config.json; "
            "config.json and weights belong to different models"
        )
    for name, shape in shapes.items():
        tensor = on_disk[name]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
    return on_disk


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, read from the file headers. Rotary tables of old checkpoints are left out.

    Raises:
      UserError: if there are no safetensors (pickles are refused), if a file is missing, truncated or damaged, or if
        the index names a file outside the folder.
    """
    index = folder / _INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: field weight_map is missing; fetch the checkpoint again")
        files = sorted(set(weight_map.values()))
        for name in files:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: weight_map names {name!r}; only .safetensors files beside it are read")
    elif (folder / _SINGLE).exists():
        weight_map, files = None, [_SINGLE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder}: {pickles[0]} is a pickle, which can run code and is never read; convert it to safetensors"
            )
        raise UserError(f"{folder}: no {_SINGLE} and no {_INDEX}; give a Hugging Face folder with safetensors")
    on_disk: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing, though {_INDEX} names it; fetch the checkpoint again")
        of_file = _header(folder / name)
        twice = on_disk.keys() & of_file.keys()
        if twice:
            raise UserError(f"{folder / name}: tensor {min(twice)} is in another file too; fetch the checkpoint again")
        on_disk |= of_file
    if weight_map is not None and (lost := weight_map.keys() - on_disk.keys()):
        raise UserError(f"{index}: tensor {min(lost)} is in none of the files; fetch the checkpoint again")
    return {name: t for name, t in on_disk.items() if not name.endswith("rotary_emb.inv_freq")}


def tensor_dtypes(folder: Path) -> dict[str, np.dtype]:
    """The dtype of every tensor on disk."""
    return {name: tensor.dtype for name, tensor in tensors(folder).items()}


def fingerprint(folder: Path) -> str:
    """A hash of config.json and of every tensor's name, type, shape and first, middle and last 4 KiB.

    It takes little time for any model size. Checkpoints of one training run differ in every tensor, so their hashes
    differ. A few changed values in the middle of a tensor may not change the hash.
    """
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for name, tensor in sorted(tensors(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        flat = tensor.map().reshape(-1).view(np.uint8)
        for start in (0, flat.size // 2, max(0, flat.size - 4096)):
            digest.update(flat[start : start + 4096].tobytes())
    return digest.hexdigest()[:16]


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: 8 bytes of length, a JSON header, then the bytes that it describes."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(length)
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _entry(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a safetensors file; fetch the checkpoint again") from error


def _entry(file: Path, name: str, entry: dict[str, Any], data: int, size: int) -> Tensor:
    """One tensor of a header. `data`: offset of the first tensor in the file; `size`: of the file; both in bytes."""
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"{file}: tensor {name} has dtype {entry['dtype']}; only {', '.join(_DTYPES)} are read "
            "(quantised checkpoints: give the original)"
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if stop - start != dtype.itemsize * int(np.prod(shape)) or start < 0:
        raise ValueError(name)
    if data + stop > size:
        raise UserError(f"{file} is cut short at tensor {name}; fetch the checkpoint again")
    return Tensor(file, dtype, shape, data + start)


def _check_tied(on_disk: dict[str, Tensor], folder: Path) -> None:
    """Raises UserError if the head differs from the embedding, though config.json says they are tied."""
    head, embedding = on_disk[_HEAD], on_disk[_EMBEDDING]
    if head.dtype != embedding.dtype or not np.array_equal(head.map().view(np.uint8), embedding.map().view(np.uint8)):
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but {_HEAD} differs from the "
            "embedding; set it to false"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a Hugging Face folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object; fetch the checkpoint again")
    return value


# --------------------------------------------------------------------------------------- writing


def save(
    folder: Path,
    params: Params,
    config: ModelConfig,
    hf_config: dict[str, Any],
    dtypes: dict[str, np.dtype],
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes config.json and sharded safetensors. Every process must call it; process 0 writes.

    Args:
      hf_config: the contents of config.json.
      dtypes: of the tensors, by Hugging Face name: as in the checkpoint that training started from.
      max_shard_bytes: maximum size of a file, which also limits the host memory needed.
    """
    check_rows_cover(params, config)
    files = _Files(folder, max_shard_bytes)
    for row in table(config):
        array = leaf_of(params, row.path)
        for i, name in enumerate(row.names(config.num_layers)):
            gathered = multihost_utils.process_allgather(array[i] if row.stacked else array, tiled=True)
            tensor = np.ascontiguousarray(row.to_hf(np.asarray(gathered)).astype(dtypes[name]))
            copies = (name, _HEAD) if config.tied_head and name == _EMBEDDING else (name,)
            for copy in copies:
                if copy in dtypes:
                    files.add(copy, tensor)
    files.close(hf_config)


class _Files:
    """Writes the safetensors files of a folder: tensors are added to a file until it is full."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._writes = jax.process_index() == 0
        self._names: list[list[str]] = []  # names of the tensors in each written file
        self._pending: dict[str, np.ndarray] = {}
        self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._total += tensor.nbytes

    def close(self, hf_config: dict[str, Any]) -> None:
        """Writes the last file and config.json, and renames the files as Hugging Face expects."""
        self._flush()
        if not self._writes:
            return
        (self._folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if len(self._names) == 1:
            (self._folder / "part-0").rename(self._folder / _SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._names):
            file = f"model-{i + 1:05d}-of-{len(self._names):05d}.safetensors"
            (self._folder / f"part-{i}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._writes:
            file = self._folder / f"part-{len(self._names)}"
            file.touch()
            mode = file.stat().st_mode
            save_file(self._pending, file, metadata={"format": "pt"})
            file.chmod(mode)  # safetensors creates files that only the owner can read
        self._names.append(list(self._pending))
        self._pending.clear()
