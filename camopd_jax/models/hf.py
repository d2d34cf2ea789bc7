"""Hugging Face folders: safetensors straight onto the mesh, and back."""

import hashlib
import json
from dataclasses import dataclass
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
from camopd_jax.models.weights import check_rows_cover, leaf_of, shardings, table, tree_of
from camopd_jax.types import Params

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on disk."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        """The tensor, read from disk only where it is looked at."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


# --------------------------------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or a file like it.

    Raises:
      UserError: if it is missing, no JSON, or asks for remote code.
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
    """Reads the parameters onto the mesh, each device's piece straight from disk.

    The host holds one piece of one stacked parameter at a time.

    Raises:
      UserError: for all that `matching` refuses.
    """
    found = matching(folder, config)
    places = shardings(config, mesh)
    leaves = {}
    for row in table(config):
        layers = range(config.num_layers) if row.stacked else [0]
        views = [row.from_hf(found[row.hf_name.format(i)].map()) for i in layers]

        def piece(index: tuple[slice, ...], views=views, stacked=row.stacked) -> np.ndarray:
            wanted = [view[index[1:]] for view in views[index[0]]] if stacked else [views[0][index]]
            out = np.empty((len(wanted), *wanted[0].shape), dtype)
            for layer, view in zip(out, wanted, strict=True):
                layer[...] = view
            return out if stacked else out[0]

        leaf = jax.make_array_from_callback(row.shape(config.num_layers), leaf_of(places, row.path), piece)
        leaves[row.path] = jax.block_until_ready(leaf)  # else the next piece is read while this one is still held
    return tree_of(leaves)


def matching(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder, which are those of a model of this config.

    Raises:
      UserError: for missing, extra or misshaped tensors, and for all `tensors` refuses.
    """
    found = tensors(folder)
    names = {
        row.hf_name.format(i): row.hf_shape
        for row in table(config)
        for i in range(config.num_layers if row.stacked else 1)
    }
    if config.tied_head and "lm_head.weight" in found:
        _check_tied(found, folder)
        names["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    missing, extra = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); fetch the checkpoint again")
    if extra:
        raise UserError(
            f"{folder}: tensor {extra[0]} ({len(extra)} in all) has no place in a model of this config.json; "
            "config.json and weights belong to different models"
        )
    for name, shape in names.items():
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].file}: tensor {name} has shape {list(found[name].shape)}, "
                f"config.json asks for {list(shape)}"
            )
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name, from the headers alone. Rotary tables of old checkpoints are left out.

    Raises:
      UserError: if there are no safetensors (pickles are refused), a file is missing, cut short or
        broken, or the index names a file outside the folder.
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
    found: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing, though {_INDEX} names it; fetch the checkpoint again")
        part = _header(folder / name)
        twice = found.keys() & part.keys()
        if twice:
            raise UserError(f"{folder / name}: tensor {min(twice)} is in another file too; fetch the checkpoint again")
        found |= part
    if weight_map is not None and (lost := weight_map.keys() - found.keys()):
        raise UserError(f"{index}: tensor {min(lost)} is in none of the files; fetch the checkpoint again")
    return {name: t for name, t in found.items() if not name.endswith("rotary_emb.inv_freq")}


def tensor_dtypes(folder: Path) -> dict[str, np.dtype]:
    """The dtype of every tensor on disk."""
    return {name: tensor.dtype for name, tensor in tensors(folder).items()}


def fingerprint(folder: Path) -> str:
    """A hash of config.json and of every tensor's name, type, shape and first, middle and last 4 KiB.

    Cheap on any size of model. Two checkpoints of one training run differ in every tensor, so they
    differ here; a few changed numbers in the middle of a tensor may pass unseen.
    """
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for name, tensor in sorted(tensors(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        flat = tensor.map().reshape(-1).view(np.uint8)
        for start in (0, flat.size // 2, max(0, flat.size - 4096)):
            digest.update(flat[start : start + 4096].tobytes())
    return digest.hexdigest()[:16]


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: 8 bytes of length, a JSON header, then the bytes it tells of."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length <= size - 8 else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {}
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise UserError(
                    f"{file}: tensor {name} has dtype {entry['dtype']}; only {', '.join(_DTYPES)} are read "
                    "(quantised checkpoints: give the original)"
                )
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if stop - start != dtype.itemsize * int(np.prod(shape)) or start < 0:
                raise ValueError(name)
            if 8 + length + stop > size:
                raise UserError(f"{file} is cut short at tensor {name}; fetch the checkpoint again")
            found[name] = Tensor(file, dtype, shape, 8 + length + start)
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no safetensors file; fetch the checkpoint again") from error


def _check_tied(found: dict[str, Tensor], folder: Path) -> None:
    head, embedding = found["lm_head.weight"], found["model.embed_tokens.weight"]
    if head.dtype != embedding.dtype or not np.array_equal(head.map().view(np.uint8), embedding.map().view(np.uint8)):
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from the "
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
    """Writes config.json and sharded safetensors. Every process takes part; the first one writes.

    Args:
      hf_config: the config.json to write.
      dtypes: of the tensors, by Hugging Face name: those of the checkpoint that training started from.
      max_shard_bytes: files stay below this, and so does the host's memory.
    """
    check_rows_cover(params, config)
    writer = jax.process_index() == 0
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if writer:
            file = folder / f"part-{len(shards)}"
            file.touch()
            mode = file.stat().st_mode
            save_file(pending, file, metadata={"format": "pt"})
            file.chmod(mode)  # safetensors keeps a file to its owner
        shards.append(list(pending))
        pending.clear()

    for row in table(config):
        array = leaf_of(params, row.path)
        for i in range(config.num_layers if row.stacked else 1):
            name = row.hf_name.format(i)
            ours = multihost_utils.process_allgather(array[i] if row.stacked else array, tiled=True)
            tensor = np.ascontiguousarray(row.to_hf(np.asarray(ours)).astype(dtypes[name]))
            copies = [name, "lm_head.weight"] if config.tied_head and row.path == ("embedding",) else [name]
            for copy in copies:
                if copy in dtypes:
                    if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_shard_bytes:
                        flush()
                    pending[copy] = tensor
                    total += tensor.nbytes
    flush()
    if not writer:
        return
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    if len(shards) == 1:
        (folder / "part-0").rename(folder / _SINGLE)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
