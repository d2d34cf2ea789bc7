"""What a compiled program exchanges between chips, and arrays that should not be in it, read from its HLO text.

The text has every computation once; a loop's body runs as often as its condition says. Collectives are multiplied by
the loops around them. A loop that may end early counts to its bound, the worst case; of one whose bound is data, the
caller says how often it runs at most.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
         "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+|c\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|[^( ]\S*) ([a-z][\w\-]*)\((.*)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(?:%?([\w.\-]+)|\{([^}]*)\})")


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # an array's or a tuple's, as written
    opcode: str
    rest: str  # behind the opening parenthesis: operands, then attributes
    root: bool

    @cached_property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(type, dimensions) of every array of its result."""
        return tuple((kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(self.shape))

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition("), ")[0])

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """The computations that it runs, by attribute."""
        return {name: re.findall(r"[\w.\-]+", one or several) for name, one, several in _CALLED.findall(self.rest)}

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.rest)
        return match and match[1]


@dataclass
class Traffic:
    """Collectives of one kind. Bytes are of the larger of operand and result, on one chip."""

    count: int = 0  # in the text
    runs: int = 0  # with every loop's trips
    bytes: int = 0
    bytes_run: int = 0


Computation = dict[str, Instruction]


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                root, name, *parts = match.groups()
                current[name] = Instruction(name, *parts, root=bool(root))
            elif line.endswith("{") and "->" in line:
                name = line.removeprefix("ENTRY ").split(" (")[0].strip().lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def collectives(self, trips: int = 1) -> dict[str, Traffic]:
        """By kind, over one run of the program.

        Args:
          trips: of each loop whose bound is data.
        """
        total: dict[str, Traffic] = {}
        for i, kind, moved, times in self._collectives(self.entry, 1, trips, None):
            traffic = total.setdefault(kind, Traffic())
            traffic.count, traffic.runs = traffic.count + 1, traffic.runs + times
            traffic.bytes, traffic.bytes_run = traffic.bytes + moved, traffic.bytes_run + moved * times
        return total

    def _collectives(
        self, name: str, times: int, trips: int, fusion: Instruction | None
    ) -> Iterator[tuple[Instruction, str, int, int]]:
        """(instruction, kind, bytes, how often it runs)."""
        computation = self.computations[name]
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not self._goes_on(i, fusion):
                if fusion is not None and fusion.attribute(r"calls=%?(all-reduce-scatter)"):
                    kind = "reduce-scatter"  # an all-reduce of which this chip keeps its part
                operands = (computation[operand] for operand in i.operands if operand in computation)
                yield i, kind, max(_bytes(i), sum(map(_bytes, operands))), times
            again = self.trips(i, computation) if kind == "while" else 1
            inner = i if kind == "fusion" else fusion
            if kind in ("while", "fusion", "call", "async", "conditional"):
                for part in (part for parts in i.called.values() for part in parts):
                    yield from self._collectives(part, times * (trips if again is None else again), trips, inner)

    @cached_property
    def _started(self) -> set[str | None]:
        """Channels of collectives that one fusion starts and others, perhaps in a loop, take further."""
        starts = (i for i in self.instructions() if i.name.startswith("async-collective-start"))
        parts = (part for i in starts for part in i.called.get("calls", ()))
        return {channel for part in parts for i in self.computations[part].values() if (channel := _channel(i))}

    def _goes_on(self, i: Instruction, fusion: Instruction | None) -> bool:
        """Whether a collective has been counted where it was started."""
        inside = fusion is not None and not fusion.name.startswith("async-collective-start")
        return inside and _channel(i) in self._started

    def trips(self, loop: Instruction, around: Computation) -> int | None:
        """How often a while loop runs at most; None where its bound is data."""
        limit = self._limit(loop)
        if limit is None:
            return None
        index, bound = limit
        start, step = self._start(loop, index, around), self._step(loop, index)
        return max(0, -(-(bound - start) // step))

    def _limit(self, loop: Instruction) -> tuple[int, int] | None:
        """(index of the counter, bound) of a loop that goes on while the counter is less than a constant."""
        condition = self.computations[loop.called["condition"][0]]
        for i in condition.values():
            if i.opcode == "compare" and "direction=LT" in i.rest and i.shape.startswith("pred[]"):
                left, right = (condition[operand] for operand in i.operands)
                if left.opcode == "get-tuple-element" and right.opcode == "constant":
                    return int(left.attribute(r"index=(\d+)")), _constant(right)
        return None

    def _start(self, loop: Instruction, index: int, around: Computation) -> int:
        """The counter before the loop. One that an earlier loop left stands at that loop's bound."""
        carried = around[loop.operands[0]]
        value = around.get(carried.operands[index]) if carried.opcode == "tuple" else None
        while value is not None and value.opcode in ("copy", "bitcast", "convert", "get-tuple-element"):
            value = around.get(value.operands[0])
        if value is not None and value.opcode == "while":
            return (self._limit(value) or (0, 0))[1]
        return _constant(value) if value is not None and value.opcode == "constant" else 0

    def _step(self, loop: Instruction, index: int) -> int:
        """What a turn adds to the counter: 2 where the compiler has put two turns into one."""
        body = self.computations[loop.called["body"][0]]
        root = next(i for i in body.values() if i.root)
        value = body[root.operands[index]] if root.opcode == "tuple" else root
        constants = [body[operand] for operand in value.operands]
        if value.opcode == "fusion":
            inside = self.computations[value.called["calls"][0]].values()
            constants += [i for i in inside if i.opcode == "constant"]
            value = next(i for i in inside if i.root)
        steps = [_constant(i) for i in constants if i.opcode == "constant"]
        return steps[0] if value.opcode == "add" and steps else 1


def _constant(i: Instruction) -> int:
    return int(i.rest.partition(")")[0])


def _channel(i: Instruction) -> str | None:
    return i.attribute(r"channel_id=(\d+)")


def _bytes(i: Instruction) -> int:
    """Of an instruction's result; of a started collective's tuple, its largest array."""
    sizes = [_BITS.get(kind, 8) * math.prod(dims) // 8 for kind, dims in i.arrays]
    return max(sizes, default=0) if i.opcode.endswith("-start") else sum(sizes)


# ------------------------------------------------------------------------------- what must not be


def gathered_stacks(module: Module, layers: int) -> list[Instruction]:
    """All-gathers of a parameter of all layers at once, `[L, ...]`: the scan should gather one layer at a time."""

    def stacked(dims: tuple[int, ...]) -> bool:
        wide = [d for d in dims if d != 1]
        return len(wide) >= 3 and wide[0] == layers

    gathers = (i for i in module.instructions() if i.opcode in ("all-gather", "all-gather-start"))
    return [i for i in gathers if any(stacked(dims) for _, dims in i.arrays)]


def whole_logits(module: Module, tokens: int, vocab: tuple[int, ...]) -> list[Instruction]:
    """Arrays with logits of all `tokens` of one chip at once, `[B, T, V]` in any order and grouping.

    Args:
      vocab: the vocabulary's size, complete and as one chip has it.
    """

    def logits(dims: tuple[int, ...]) -> bool:
        return any(v in dims and math.prod(dims) >= tokens * v for v in vocab)

    return [i for i in module.instructions() if any(logits(dims) for _, dims in i.arrays)]
