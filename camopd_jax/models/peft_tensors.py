"""The tensors of adapter_model.safetensors by the names of the parameters that they belong to.

Beside the matrices of an adapter, PEFT saves embedding and head if the adapter trains them (`modules_to_save`), if the
vocabulary was resized, and if some of their rows are trained (`trainable_token_indices`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camopd_jax.errors import UserError
from camopd_jax.models.disk import Tensor, read_header, tensors
from camopd_jax.models.names import EMBEDDING, HEAD, standard_names
from camopd_jax.models.weights import PEFT_PREFIX

TOKENS = "trainable_token_indices"
_COPIES = (".original_module.weight", ".modules_to_save.weight")  # of a resized module in `modules_to_save`
_ALL_ROWS, _SOME_ROWS = ".token_adapter.base_layer.weight", ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class WithRows(Tensor):
    """A tensor of which some rows are replaced."""

    rows: Tensor
    indices: tuple[int, ...]

    def map(self) -> np.ndarray:
        array = np.array(super().map())
        array[list(self.indices)] = self.rows.map()
        return array


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by PEFT's names, without those that PEFT writes a second time."""
    named = {re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", n): t for n, t in read_header(file).items()}
    return {name: tensor for name, tensor in named.items() if not _is_copy(name, named)}


def _is_copy(name: str, named: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) + ".weight" in named for end in _COPIES)


def parts(on_disk: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a file has of the embedding or the head: {} or all its rows, some rows to replace, or both, by ending."""
    module = PEFT_PREFIX + name.removesuffix(".weight")
    return {end: on_disk[module + end] for end in (".weight", _ALL_ROWS, _SOME_ROWS) if module + end in on_disk}


def row_count(on_disk: Mapping[str, Tensor], name: str) -> int | None:
    """The number of rows of the embedding or the head, if a file has all of them."""
    counts = [(t.shape or (0,))[0] for end, t in parts(on_disk, name).items() if end != _SOME_ROWS]
    return counts[0] if counts else None


def are_equal(on_disk: Mapping[str, Tensor]) -> bool:
    """Whether embedding and head, both of which a file has, are the same."""
    one, other = parts(on_disk, EMBEDDING), parts(on_disk, HEAD)
    return one.keys() == other.keys() and all(np.array_equal(one[end].map(), other[end].map()) for end in one)


def with_replaced_rows(
    on_disk: Mapping[str, Tensor], fields: Mapping[str, Any], base: Path, where: str
) -> dict[str, Tensor]:
    """The tensors of a file, in which embedding and head are complete.

    Args:
      fields: of adapter_config.json.
      base: the folder of the base model, for the other rows.
      where: the file of `fields`, for error messages.

    Raises:
      UserError: if the replaced rows are not those of `trainable_token_indices`.
    """
    out = dict(on_disk)
    for name in (EMBEDDING, HEAD):
        of = parts(on_disk, name)
        if _SOME_ROWS not in of:
            continue
        module = PEFT_PREFIX + name.removesuffix(".weight")
        for end in of:
            del out[module + end]
        complete = of.get(_ALL_ROWS) or standard_names(tensors(base), (EMBEDDING, HEAD), True, base)[name]
        rows, indices = of[_SOME_ROWS], _indices(fields.get(TOKENS), name)
        count, width = complete.shape
        if rows.shape != (len(indices), width) or not all(0 <= i < count for i in indices):
            raise UserError(
                f"{where}: field {TOKENS} has {len(indices)} tokens for a tensor {module}{_SOME_ROWS} of shape "
                f"{list(rows.shape)} and {count} rows of {name}; config and weights do not belong to each other"
            )
        out[f"{module}.weight"] = WithRows(
            complete.file, complete.dtype, complete.shape, complete.offset, rows, indices
        )
    return out


def _indices(field: Any, name: str) -> tuple[int, ...]:
    """The tokens whose rows are replaced; those of the embedding for a head that is the same tensor."""
    if isinstance(field, dict):
        module = name.removesuffix(".weight")
        field = next((field[key] for key in field if module.endswith(key)), next(iter(field.values()), []))
    return tuple(field or ())
