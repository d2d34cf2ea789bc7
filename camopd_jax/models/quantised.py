"""Frozen kernels in int8: a kernel W [in..., out...] is `kernel * kernel_scale`, with one scale for each output.

    scale = max |W| / 127 over the inputs,   kernel = round(W / scale)

So each weight is rounded by at most half a scale. Because an output has one scale, layers multiply by the int8 numbers,
which bfloat16 represents exactly, and scale the result (`layers.Linear`); experts are scaled before their products.

Written here instead of with a library such as qwix: its `quantize_params` needs a float array on the device for each
parameter and puts nodes of its own type into the tree, while here a shard is quantised as it is read from disk, and
kernel and scale are two ordinary rows of the table of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from camopd_jax.models.rows import WeightRow
from camopd_jax.models.weights import in_int8, scale_row

INT8 = "int8"  # as a dtype of frozen weights: these kernels are int8, all other parameters have the dtype of products
LARGEST = 127
Index = tuple[slice, ...]


def scales(kernel: np.ndarray, inputs: int, matrices: int = 0) -> np.ndarray:
    """The scale of each output of a kernel, float32[matrices..., out...].

    Args:
      kernel: [matrices..., in..., out...].
      inputs: the number of its input axes.
      matrices: the number of the axes before them.
    """
    largest: np.ndarray = np.abs(kernel.astype(np.float32)).max(axis=tuple(range(matrices, matrices + inputs)))
    return largest / np.float32(LARGEST)


def quantise(kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`round(kernel / scale)`, int8 with the kernel's shape; 0 for outputs with scale 0.

    Args:
      scale: with the kernel's last axes, or with axes of length 1 in place of its inputs.
    """
    steps = kernel.astype(np.float32) / np.where(scale == 0, 1, scale)
    return steps.round().clip(-LARGEST, LARGEST).astype(np.int8)


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf of the tree of parameters, and how it is computed from the Hugging Face tensors of a row."""

    row: WeightRow  # of the leaf
    dtype: str
    read: Callable[[np.ndarray, Index], np.ndarray]  # (a tensor, slices of the leaf without its stack) -> that part


def stored_leaves(row: WeightRow, dtype: str, int8: bool) -> list[StoredLeaf]:
    """The leaves of one row of the tensors: itself in a dtype, or its scale and its kernel in int8."""
    if not int8 or not in_int8(row):
        return [StoredLeaf(row, dtype, lambda tensor, within: row.from_hf(tensor)[within])]
    first, last = row.matrices, len(row.order) - row.outputs  # between them are the inputs
    inputs = tuple(range(first, last))
    every = (slice(None),) * len(inputs)

    def scale(tensor: np.ndarray, within: Index) -> np.ndarray:
        return scales(row.from_hf(tensor)[within[:first] + every + within[first:]], len(inputs), first)

    def kernel(tensor: np.ndarray, within: Index) -> np.ndarray:
        # A scale needs all inputs, a shard may have some
        of_outputs = row.from_hf(tensor)[within[:first] + every + within[last:]]
        of_inputs = of_outputs[(slice(None),) * first + within[first:last]]
        return quantise(of_inputs, np.expand_dims(scales(of_outputs, len(inputs), first), inputs))

    return [StoredLeaf(scale_row(row), "float32", scale), StoredLeaf(row, INT8, kernel)]
