"""Reads the safetensors of Hugging Face folders directly onto the mesh, and writes such folders."""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors.numpy import save_file

from camopd_jax.errors import UserError
from camopd_jax.models.checksums import check_checksums, write_checksums
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.disk import INDEX, SINGLE, Tensor, read_json, stale_index, tensors
from camopd_jax.models.families import FAMILIES
from camopd_jax.models.mxfp4 import MXFP4, dequantized
from camopd_jax.models.names import BASE, EMBEDDING, HEAD, check_names, standard_names
from camopd_jax.models.quantised import StoredLeaf, stored_leaves
from camopd_jax.models.rows import WeightRow
from camopd_jax.models.weights import (
    check_rows_cover,
    file_rows,
    leaf_of,
    shardings,
    tensor_rows,
    tree_of,
    unused_names,
)
from camopd_jax.runtime.progress import Work, work
from camopd_jax.types import Params

# --------------------------------------------------------------------------------------- reading

_QUANTISED = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's
_MODEL_CODE = {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}  # entries of auto_map; others are not needed


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json in a folder, or the given file.

    Raises:
      UserError: if it is missing, is not JSON, or needs code from the checkpoint; if the folder has a PEFT adapter,
        whose config.json is its base model's (`peft_settings.base_folder`).
    """
    file = folder if folder.is_file() else folder / "config.json"
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(
            f"{adapter}: a PEFT adapter, which is not read here; merge it into its base model and give that folder "
            "(AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)), or delete this "
            "file if the weights beside it are merged already"
        )
    config = read_json(file)
    for field in filter(config.get, _QUANTISED):
        method = config[field].get("quant_method") if isinstance(config[field], dict) else None
        if method != MXFP4:
            raise UserError(
                f"{file}: {field} says that the checkpoint is quantised ({method}); give the original, whose weights "
                f"training needs (of quantised ones only {MXFP4} is read), or delete the field if the weights are no "
                "longer quantised, such as merged ones"
            )
        del config[field]  # its values are read as bfloat16, and saved so
    code = config.get("auto_map")
    if not code or (isinstance(code, dict) and not code.keys() & _MODEL_CODE):
        config.pop("auto_map", None)
    if "auto_map" in config and _is_published(config["auto_map"], config.get("model_type")):
        del config["auto_map"]
    if "auto_map" in config:
        raise UserError(
            f"{file}: auto_map asks for code from the checkpoint, which is never run; use a checkpoint of a built-in "
            "architecture, or delete the field if the model is exactly the built-in one of its model_type"
        )
    return config


def _is_published(auto_map: Any, model_type: Any) -> bool:
    """Whether `auto_map` asks for code that transformers has in the meantime."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return family is not None and code is not None and code == family.published_code


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """Reads the parameters onto the mesh, each shard directly from disk.

    The host has one shard of one stacked parameter in memory at a time.

    Args:
      dtype: of the parameters, except kernels in int8 (`ModelConfig.int8`), which are quantised as they are read.

    Raises:
      UserError: as `check_checksums` and `matching`; for a value that is not finite, with the name of its tensor.
    """
    check_checksums(folder)
    if warning := stale_index(folder):
        warnings.warn(warning, stacklevel=2)
    on_disk = matching(folder, config)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in on_disk.values())
    with work(f"loading {folder.name}", total, "GiB") as loading:
        return load_rows(file_rows(config), on_disk, config, mesh, dtype, loading)


def load_rows(
    rows: Iterable[WeightRow],
    on_disk: Mapping[str, Tensor],
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    loading: Work | None = None,
) -> Params:
    """Reads the parameters of some rows of a model's table onto the mesh, from tensors by standard name.

    Args:
      loading: gets the bytes that are read.

    Raises:
      UserError: for a value that is not finite, with the name of its tensor.
    """
    sharding_of = shardings(config, mesh)
    leaves = {}
    for row in rows:
        stored = [(name, on_disk[name]) for name in row.names(config.num_layers)]
        for leaf in stored_leaves(row, dtype, config.int8):
            path, shape = leaf.row.path, leaf.row.shape(config.num_layers)
            shard = partial(_shard, stored, leaf, config.num_layers, loading)
            array = jax.make_array_from_callback(shape, leaf_of(sharding_of, path), shard)
            leaves[path] = jax.block_until_ready(array)  # else this shard is in host memory while the next is read
    return tree_of(leaves)


def _shard(
    stored: list[tuple[str, Tensor]],
    leaf: StoredLeaf,
    layers: int,
    loading: Work | None,
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """One device's shard of a parameter, read from the tensors that it consists of.

    Args:
      stored: these tensors, with their names.
      loading: gets the bytes that are read.
      index: of the shard. JAX's type allows None, but it does not occur.

    Raises:
      UserError: for a value that is not finite.
    """
    assert index is not None
    numbers = np.arange(len(stored)).reshape(leaf.row.stack(layers))
    numbers, within = numbers[index[: numbers.ndim]], index[numbers.ndim :]
    out: np.ndarray | None = None
    for i in np.ndindex(numbers.shape):
        name, tensor = stored[numbers[i]]
        view = leaf.read(tensor.map(), within)
        out = np.empty((*numbers.shape, *view.shape), leaf.dtype) if out is None else out
        out[i] = view
        if loading is not None:
            loading.add(view.size * tensor.dtype.itemsize)
        if not np.isfinite(out[i]).all():
            raise UserError(f"{tensor.file}: tensor {name} has values that are not finite; give another checkpoint")
    assert out is not None
    return out


def matching(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder by standard name, checked against a model config.

    Raises:
      UserError: for missing or additional tensors and wrong shapes, and as `tensors`.
    """
    shapes = {name: row.hf_shape for row in file_rows(config) for name in row.names(config.num_layers)}
    on_disk = standard_names(_divided(folder, config)[0], shapes, config.tied_head, folder)
    if config.tied_head and HEAD in on_disk:
        _check_tied(on_disk, folder)
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    check_names(on_disk, shapes, folder)
    for name, shape in shapes.items():
        tensor = on_disk[name]
        if 0 in tensor.shape:
            raise UserError(
                f"{tensor.file}: tensor {name} is empty: DeepSpeed (ZeRO 3) saved it without gathering it. Set "
                "stage3_gather_16bit_weights_on_model_save and save again, or use the zero_to_fp32.py of the checkpoint"
            )
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
    return on_disk


def _divided(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a folder: those of the model, without the prefix of their names, and others, which it ignores."""
    prefix, replaced = config.tensor_prefix, config.replaced_prefix
    model, others, unused = dict[str, Tensor](), dict[str, Tensor](), unused_names(config)
    for name, tensor in dequantized(tensors(folder), folder).items():
        own = replaced + name.removeprefix(prefix)
        if {own, f"{BASE}{own}"} & unused:
            others[name] = tensor
        elif name.startswith(prefix):
            model[own] = tensor
        elif replaced and name == HEAD:
            model[name] = tensor
        else:
            others[name] = tensor
    return model, others


def other_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder that the model ignores, such as those of a vision model, by name."""
    return _divided(folder, config)[1]


def tensor_dtypes(folder: Path, config: ModelConfig) -> dict[str, np.dtype]:
    """The dtype of every tensor of a folder by standard name; raises as `matching`."""
    return {name: tensor.dtype for name, tensor in matching(folder, config).items()}


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


def _check_tied(on_disk: dict[str, Tensor], folder: Path) -> None:
    """Raises UserError if the head differs from the embedding, though config.json says they are tied."""
    head, embedding = on_disk[HEAD], on_disk[EMBEDDING]
    if head.dtype != embedding.dtype or not np.array_equal(head.map().view(np.uint8), embedding.map().view(np.uint8)):
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but {HEAD} differs from the "
            "embedding; set it to false"
        )


# --------------------------------------------------------------------------------------- writing


MAX_SHARD_BYTES = 4 * 2**30


def save(
    folder: Path,
    params: Params,
    config: ModelConfig,
    hf_config: dict[str, Any],
    dtypes: dict[str, np.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json and sharded safetensors. Every process must call it; process 0 writes.

    Args:
      hf_config: the contents of config.json.
      dtypes: of the tensors, by Hugging Face name: as in the checkpoint that training started from.
      max_shard_bytes: maximum size of a file, which also limits the host memory needed.
      others: tensors that are not the model's, which are copied.
    """
    check_rows_cover(params, config)
    names = [(rows, rows[0].names(config.num_layers)) for rows in tensor_rows(config)]
    total = sum(math.prod(rows[0].hf_shape) * dtypes[name].itemsize for rows, of_rows in names for name in of_rows)
    with work("writing weights", total, "GiB") as writing:
        files = _Files(folder, max_shard_bytes, writing)
        for rows, of_rows in names:
            for index, name in zip(np.ndindex(rows[0].stack(config.num_layers)), of_rows, strict=True):
                tensor = np.empty(rows[0].hf_shape, dtypes[name])
                for row in rows:
                    row.part_of(tensor)[...] = _gathered(leaf_of(params, row.path), row, index)
                copies = (name, HEAD) if config.tied_head and name == EMBEDDING else (name,)
                for copy in copies:
                    if copy in dtypes:
                        files.add(_name_in_file(copy, config), tensor)
        for name, other in (others or {}).items():
            files.add(name, np.array(other.map()))
        files.close(hf_config)


def _name_in_file(name: str, config: ModelConfig) -> str:
    """The name of a tensor in a checkpoint, which may have other modalities."""
    replaced = config.replaced_prefix
    return config.tensor_prefix + name.removeprefix(replaced) if name.startswith(replaced) else name


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with the permissions of a new file: safetensors' own lets only the owner read it."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def _gathered(array: jax.Array, row: WeightRow, index: tuple[int, ...]) -> np.ndarray:
    """A parameter's part of a Hugging Face tensor, from all devices.

    Args:
      index: of the tensor in the stack of the parameter's tensors.
    """
    gathered = multihost_utils.process_allgather(array[index] if index else array, tiled=True)
    return row.to_hf(np.asarray(gathered))


class _Files:
    """Writes the safetensors files of a folder: tensors are added to a file until it is full."""

    def __init__(self, folder: Path, max_bytes: int, writing: Work):
        """`writing` gets the bytes that are written."""
        self._folder, self._max_bytes, self._writing = folder, max_bytes, writing
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
        """Writes the last file, config.json and checksums, and renames the files as Hugging Face expects."""
        self._flush()
        if not self._writes:
            return
        (self._folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if len(self._names) == 1:
            (self._folder / "part-0").rename(self._folder / SINGLE)
            write_checksums(self._folder)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._names):
            file = f"model-{i + 1:05d}-of-{len(self._names):05d}.safetensors"
            (self._folder / f"part-{i}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        write_checksums(self._folder)

    def _flush(self) -> None:
        if self._writes:
            file = self._folder / f"part-{len(self._names)}"
            write_tensors(file, self._pending)
        self._writing.add(sum(tensor.nbytes for tensor in self._pending.values()))
        self._names.append(list(self._pending))
        self._pending.clear()
