"""Hugging Face folders: safetensors straight onto the mesh, and back."""

import hashlib
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors.numpy import save_file

from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.disk import INDEX, SINGLE, Tensor, read_json, stale_index, tensors
from camopd_jax.models.names import EMBEDDING, HEAD, check_names, standard_names
from camopd_jax.models.weights import Row, check_rows_cover, leaf_of, shardings, table, tree_of
from camopd_jax.types import Params

# --------------------------------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or a file like it.

    Raises:
      UserError: if it is missing, no JSON, or asks for remote code, and for a folder that holds a PEFT adapter.
    """
    file = folder if folder.is_file() else folder / "config.json"
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(
            f"{adapter}: a PEFT adapter, which is not read; merge it into its base model and give that folder "
            "(AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)), or delete this "
            "file if the weights beside it are merged already"
        )
    config = read_json(file)
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
      UserError: for all that `matching` refuses, and for a value that is not finite, naming its tensor.
    """
    if warning := stale_index(folder):
        warnings.warn(warning, stacklevel=2)
    on_disk = matching(folder, config)
    sharding_of = shardings(config, mesh)
    leaves = {}
    for row in table(config):
        stored = [(name, on_disk[name]) for name in row.names(config.num_layers)]
        piece = partial(_piece, stored, row, dtype)
        leaf = jax.make_array_from_callback(row.shape(config.num_layers), leaf_of(sharding_of, row.path), piece)
        leaves[row.path] = jax.block_until_ready(leaf)  # else the next piece is read while this one is still held
    return tree_of(leaves)


def _piece(stored: list[tuple[str, Tensor]], row: Row, dtype: str, index: tuple[slice, ...] | None) -> np.ndarray:
    """What one device holds of a parameter, read from the tensors that make it.

    Args:
      stored: these tensors, with their names.
      index: of the piece; None, which JAX's own type admits, does not occur.

    Raises:
      UserError: for a value that is not finite.
    """
    assert index is not None
    layers, within = (stored[index[0]], index[1:]) if row.stacked else (stored, index)
    views = [row.from_hf(tensor.map())[within] for _, tensor in layers]
    out = np.empty((len(views), *views[0].shape), dtype)
    for layer, view, (name, tensor) in zip(out, views, layers, strict=True):
        layer[...] = view
        if not np.isfinite(layer).all():
            raise UserError(f"{tensor.file}: tensor {name} has values that are not finite; give another checkpoint")
    return out if row.stacked else out[0]


def matching(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder, which are those of a model of this config, by their standard names.

    Raises:
      UserError: for missing, extra or misshaped tensors, and for all `tensors` refuses.
    """
    shapes = {name: row.hf_shape for row in table(config) for name in row.names(config.num_layers)}
    on_disk = standard_names(tensors(folder), shapes, config.tied_head, folder)
    if config.tied_head and HEAD in on_disk:
        _check_tied(on_disk, folder)
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    check_names(on_disk, shapes, folder)
    for name, shape in shapes.items():
        tensor = on_disk[name]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
    return on_disk


def tensor_dtypes(folder: Path, config: ModelConfig) -> dict[str, np.dtype]:
    """The dtype of every tensor of a folder, which is `matching`, by its standard name."""
    return {name: tensor.dtype for name, tensor in matching(folder, config).items()}


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


def _check_tied(on_disk: dict[str, Tensor], folder: Path) -> None:
    """Raises UserError if a head that config.json ties to the embedding differs from it."""
    head, embedding = on_disk[HEAD], on_disk[EMBEDDING]
    if head.dtype != embedding.dtype or not np.array_equal(head.map().view(np.uint8), embedding.map().view(np.uint8)):
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but {HEAD} differs from the "
            "embedding; set it to false"
        )


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
    files = _Files(folder, max_shard_bytes)
    for row in table(config):
        array = leaf_of(params, row.path)
        for i, name in enumerate(row.names(config.num_layers)):
            gathered = multihost_utils.process_allgather(array[i] if row.stacked else array, tiled=True)
            tensor = np.ascontiguousarray(row.to_hf(np.asarray(gathered)).astype(dtypes[name]))
            copies = (name, HEAD) if config.tied_head and name == EMBEDDING else (name,)
            for copy in copies:
                if copy in dtypes:
                    files.add(copy, tensor)
    files.close(hf_config)


class _Files:
    """The safetensors files of a folder in the making: tensors join one until it is full."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._writes = jax.process_index() == 0
        self._names: list[list[str]] = []  # of the tensors of each file that is full
        self._pending: dict[str, np.ndarray] = {}
        self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._total += tensor.nbytes

    def close(self, hf_config: dict[str, Any]) -> None:
        """Writes what is pending and config.json, and gives the files the names that Hugging Face expects."""
        self._flush()
        if not self._writes:
            return
        (self._folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if len(self._names) == 1:
            (self._folder / "part-0").rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._names):
            file = f"model-{i + 1:05d}-of-{len(self._names):05d}.safetensors"
            (self._folder / f"part-{i}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._writes:
            file = self._folder / f"part-{len(self._names)}"
            file.touch()
            mode = file.stat().st_mode
            save_file(self._pending, file, metadata={"format": "pt"})
            file.chmod(mode)  # safetensors keeps a file to its owner
        self._names.append(list(self._pending))
        self._pending.clear()
