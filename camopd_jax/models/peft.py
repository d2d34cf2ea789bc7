"""Reads and writes adapter_model.safetensors, the weights of PEFT's LoRA adapters."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from camopd_jax.errors import UserError
from camopd_jax.models import hf
from camopd_jax.models.checksums import check_checksums, write_checksums
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.disk import Tensor, read_header, read_json
from camopd_jax.models.names import HEAD
from camopd_jax.models.peft_settings import CONFIG, WEIGHTS, AdapterSettings, base_folder
from camopd_jax.models.peft_tensors import read_tensors, with_replaced_rows
from camopd_jax.models.rows import WeightRow
from camopd_jax.models.weights import (
    LORA_A,
    LORA_SCALE,
    PEFT_PREFIX,
    adapter_rows,
    leaf_of,
    shardings,
    tree_of,
)
from camopd_jax.types import Params

Leaves = dict[tuple[str, ...], np.ndarray]  # arrays by their path in the tree of parameters


def matching(folder: Path, settings: AdapterSettings, base: ModelConfig) -> dict[str, Tensor]:
    """The tensors of an adapter by PEFT's names, checked against its settings and base model.

    Raises:
      UserError: naming the file and tensor, for missing and additional tensors and wrong shapes.
    """
    file = folder / WEIGHTS
    if not file.exists():
        raise UserError(
            f"{file} is missing; save the adapter with save_pretrained, or delete {CONFIG} if the weights in this "
            "folder are a whole model"
        )
    on_disk = with_replaced_rows(read_tensors(file), settings.fields, base_folder(folder), str(folder / CONFIG))
    if settings.tied_head:
        on_disk.pop(PEFT_PREFIX + HEAD, None)  # the embedding once more
    wanted = {PEFT_PREFIX + name: row.hf_shape for row in settings.saved for name in row.names(base.num_layers)}
    for row in adapter_rows(settings.model_config(base)):
        for _, name, rank in _stored(row, settings):
            wanted[name] = (rank, row.hf_shape[1]) if row.path[-1] == LORA_A else (row.hf_shape[0], rank)
    missing, extra = sorted(wanted.keys() - on_disk.keys()), sorted(on_disk.keys() - wanted.keys())
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing ({len(missing)} in all), which {CONFIG} asks for")
    if extra:
        raise UserError(
            f"{file}: tensor {extra[0]} ({len(extra)} in all) has no place in this adapter of a model with "
            f"{base.num_layers} layers; {CONFIG}, the weights and the base model do not belong together"
        )
    for name, shape in wanted.items():
        if on_disk[name].shape != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {list(on_disk[name].shape)}, {CONFIG} and the base model ask for "
                f"{list(shape)}"
            )
    return on_disk


def _stored(row: WeightRow, settings: AdapterSettings) -> Iterator[tuple[int, str, int]]:
    """(index in the stack, name, rank) of each tensor of a leaf. A layer without adapter has none, and a scale is not
    stored.
    """
    if row.path[-1] == LORA_SCALE:
        return
    ranks = settings.ranks[row.module]
    for i, (name, rank) in enumerate(zip(row.names(len(ranks)), ranks, strict=True)):
        if rank:
            yield i, name, rank


def load_matrices(folder: Path, settings: AdapterSettings, base: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """Reads an adapter's matrices A and B onto the mesh.

    Raises:
      UserError: as `check_checksums` and `matching`; for a value that is not finite, with the name of its tensor.
    """
    check_checksums(folder)
    on_disk, file, config = matching(folder, settings, base), folder / WEIGHTS, settings.model_config(base)
    leaves: Leaves = {}
    for row in adapter_rows(config):
        if row.path[-1] == LORA_SCALE:
            continue
        stacked = np.zeros((*row.stack(config.num_layers), *row.hf_shape), np.float32)
        for i, name, _ in _stored(row, settings):
            tensor = on_disk[name].map().astype(np.float32)
            if not np.isfinite(tensor).all():
                raise UserError(f"{file}: tensor {name} has values that are not finite; give another checkpoint")
            stacked[i][tuple(map(slice, tensor.shape))] = tensor
        leaves[row.path] = np.stack([row.from_hf(tensor) for tensor in stacked]).astype(dtype)
    return place(leaves, config, mesh)


def scales(settings: AdapterSettings, base: ModelConfig, mesh: Mesh) -> Params:
    """The constant factors of an adapter, float32 whatever the dtype of its matrices."""
    config = settings.model_config(base)
    rows = (row for row in adapter_rows(config) if row.path[-1] == LORA_SCALE)
    values = {row.path: np.array(settings.scales[row.module], np.float32) for row in rows}
    return place(values, config, mesh)


def load_saved(folder: Path, settings: AdapterSettings, base: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """Reads the parameters that an adapter replaces."""
    on_disk = {name.removeprefix(PEFT_PREFIX): t for name, t in matching(folder, settings, base).items()}
    return hf.load_rows(settings.saved, on_disk, settings.model_config(base), mesh, dtype)


def place(leaves: Leaves, config: ModelConfig, mesh: Mesh) -> Params:
    """Puts arrays that every process has onto the mesh, as a tree."""
    of_leaves = shardings(config, mesh)

    def piece(array: np.ndarray, index: Any) -> np.ndarray:
        return array[index]

    return tree_of({
        path: jax.make_array_from_callback(array.shape, leaf_of(of_leaves, path), partial(piece, array))
        for path, array in leaves.items()
    })  # fmt: skip


def save(folder: Path, params: Params, settings: AdapterSettings, config: ModelConfig, original: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors. Every process must call it; process 0 writes.

    Args:
      original: the folder from which the adapter was read; all its tensors but the matrices are copied from there.
    """
    saved = tensors(params, settings, config)
    if jax.process_index() != 0:
        return
    if settings.saved:
        on_disk = read_tensors(original / WEIGHTS)
        saved |= {name: tensor.map() for name, tensor in on_disk.items() if name not in saved}
    fields = {**settings.fields, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    hf.write_tensors(folder / WEIGHTS, saved)
    write_checksums(folder)


def tensors(params: Params, settings: AdapterSettings, config: ModelConfig) -> dict[str, np.ndarray]:
    """The matrices of an adapter by PEFT's names, each with the rank of its own layer. Every process must call it."""
    named: dict[str, np.ndarray] = {}
    for row in adapter_rows(config):
        if row.path[-1] == LORA_SCALE:
            continue
        layers = np.asarray(multihost_utils.process_allgather(leaf_of(params, row.path), tiled=True))
        for i, name, rank in _stored(row, settings):
            tensor = row.to_hf(layers[i])
            named[name] = np.ascontiguousarray(tensor[:rank] if row.path[-1] == LORA_A else tensor[:, :rank])
    return named


def fingerprint(folder: Path, base: str) -> str:
    """A hash of an adapter's settings and weights, and of its base model's fingerprint."""
    settings = {name: value for name, value in read_json(folder / CONFIG).items() if name != "base_model_name_or_path"}
    digest = hashlib.sha256(json.dumps([base, settings], sort_keys=True).encode())
    for name, tensor in sorted(read_header(folder / WEIGHTS).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.map().tobytes())
    return digest.hexdigest()[:16]
