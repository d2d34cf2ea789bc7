"""Bytes that a compiled program moves to and from a chip's HBM, read from its HLO text, loops multiplied.

As XLA's own cost analysis counts them, which has each loop's body once: operands and results of every instruction that
stands outside of fusions; where a fusion only slices an operand, the slices; where it writes into one, what it writes.
"""

import math
import re
from collections.abc import Callable, Iterator

from camopd_jax.planning.hlo import BITS, Instruction, Loop, Module

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id",
         "copy-done", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done"}  # fmt: skip
_THROUGH = ("bitcast", "copy", "convert", "reshape", "transpose")
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(module: Module, trips: Callable[[Loop], int] = lambda loop: 1) -> float:
    """Of one chip, over one run; `trips` is asked for the loops whose bound is data."""
    return _walk(module, module.entry, trips)


def _walk(module: Module, name: str, trips: Callable[[Loop], int]) -> float:
    computation, total = module.computations[name], 0.0
    for i in computation.values():
        if i.opcode == "while":
            loop = module.loop(i, computation)
            n = trips(loop) if loop.trips is None else loop.trips
            total += n * sum(_walk(module, part, trips) for part in i.called("body", "condition"))
        elif i.opcode in ("call", "conditional", "async-start"):
            parts = i.called("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
            total += sum(_walk(module, part, trips) for part in parts)
        elif i.opcode == "fusion":
            total += _fusion(i, computation, module.computations[i.called("calls")[0]])
        elif i.opcode not in _FREE:
            total += _plain(i, computation)
    return total


def _plain(i: Instruction, around: dict[str, Instruction]) -> float:
    operands = [size(around[o].shape) for o in i.operands if o in around]
    if i.opcode in _SLICES:
        return 2 * size(i.shape)
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operands[-1 if i.opcode == "scatter" else 1]
    if i.opcode.endswith("-start"):  # its tuple names the operand again
        return 2 * max(operands, default=0)
    return size(i.shape) + sum(operands)


def _fusion(i: Instruction, around: dict[str, Instruction], inside: dict[str, Instruction]) -> float:
    read = 0.0
    parameters = {int(p.inner): p for p in inside.values() if p.opcode == "parameter"}
    for number, operand in enumerate(i.operands):
        whole = size(around[operand].shape) if operand in around else 0
        users = list(_users(parameters[number].name, inside))
        parts = [_part_read(user, source, inside) for user, source in users]
        read += min(whole, sum(parts)) if whole and parts and None not in parts else whole
    root = next(x for x in inside.values() if x.root)
    results = [inside[o] for o in root.operands if o in inside] if root.opcode == "tuple" else [root]
    written = size(i.shape)
    for result in results:
        source = _source(result, inside)
        if source.opcode == "dynamic-update-slice":  # in place
            written += size(inside[source.operands[1]].shape, everywhere=True) - size(source.shape, everywhere=True)
    return read + max(0.0, written)


def _users(name: str, inside: dict[str, Instruction]) -> Iterator[tuple[Instruction, str]]:
    """Those of a value, seen through what only names it anew."""
    for user in inside.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _users(user.name, inside)
            else:
                yield user, name


def _part_read(user: Instruction, source: str, inside: dict[str, Instruction]) -> float | None:
    """Bytes of an operand that a user reads; None: all."""
    if user.opcode in _SLICES and user.operands[0] == source:
        return size(user.shape, everywhere=True)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == source:
        return 0
    return None


def _source(i: Instruction, inside: dict[str, Instruction]) -> Instruction:
    while i.opcode in _THROUGH and i.operands and i.operands[0] in inside:
        i = inside[i.operands[0]]
    return i


def size(shape: str, everywhere: bool = False) -> int:
    """Bytes of the arrays of a shape as written, without those in a chip's own memory: S(1) and others."""
    found = ((kind, dims) for kind, dims, layout in _ARRAY.findall(shape) if everywhere or "S(" not in layout)
    return sum(BITS.get(kind, 0) * math.prod(map(int, dims.split(",") if dims else ())) // 8 for kind, dims in found)
