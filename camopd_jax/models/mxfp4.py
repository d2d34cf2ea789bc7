"""Tensors of 4-bit floats with a common exponent for every 32 of them (MXFP4), as checkpoints of gpt-oss have them.

https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf, section 6.3
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from camopd_jax.errors import UserError
from camopd_jax.models.disk import BLOCKS, SCALES, Tensor

MXFP4 = "mxfp4"  # its name in config.json
_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_VALUES, -_VALUES])  # of the 4 bits
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=1)  # of a byte
_BYTES = 16  # of the values with a common exponent
_BIAS = 127  # of the exponent


@dataclass(frozen=True)
class Quantized(Tensor):
    """A tensor [experts, inputs, outputs] that is stored in 4 bits, [experts, outputs, inputs] there."""

    blocks: Tensor  # uint8[experts, outputs, inputs / 32, 16], two values in a byte, the first in its lower half
    scales: Tensor  # uint8[experts, outputs, inputs / 32], the exponents

    def map(self) -> np.ndarray:
        """The tensor in bfloat16, which has every such value."""
        experts, inputs, outputs = self.shape
        out = np.empty((experts, outputs, inputs), ml_dtypes.bfloat16)
        blocks, scales = self.blocks.map(), self.scales.map()
        for i in range(experts):  # little beside the result is in memory
            values = _PAIRS[blocks[i]].reshape(outputs, -1, 2 * _BYTES)
            with np.errstate(over="ignore"):  # an infinite value is refused with the tensor's name
                scaled = np.ldexp(values, scales[i].astype(np.int32)[..., None] - _BIAS)
            out[i] = scaled.reshape(outputs, inputs)
        return out.swapaxes(1, 2)


def dequantized(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with one for the blocks and scales of each quantised tensor.

    Raises:
      UserError: for blocks without scales that fit, or scales without blocks.
    """
    named = {name: tensor for name, tensor in tensors.items() if not name.endswith((BLOCKS, SCALES))}
    for name in sorted(tensors.keys() - named.keys()):
        base = name.removesuffix(BLOCKS).removesuffix(SCALES)
        blocks, scales = tensors.get(base + BLOCKS), tensors.get(base + SCALES)
        if blocks is None or scales is None:
            lacking = base + (BLOCKS if blocks is None else SCALES)
            raise UserError(
                f"{folder}: tensor {lacking} is missing, though {name} is there; fetch the checkpoint again"
            )
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or blocks.shape[:-1] != scales.shape:
            raise UserError(
                f"{blocks.file}: tensor {base}{BLOCKS} has shape {list(blocks.shape)}, {base}{SCALES} has "
                f"{list(scales.shape)}; give [experts, outputs, n, {_BYTES}] and [experts, outputs, n]"
            )
        experts, outputs, groups, _ = blocks.shape
        shape = (experts, groups * 2 * _BYTES, outputs)
        named[base] = Quantized(blocks.file, np.dtype(ml_dtypes.bfloat16), shape, blocks.offset, blocks, scales)
    return named
