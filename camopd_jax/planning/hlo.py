"""What a compiled program exchanges between chips, and arrays that should not be in it, read from its HLO text.

The text has every computation once; collectives are multiplied by the loops around them. A loop that may end early
counts to its bound, the worst case; of one whose bound is data, the caller says how often it runs at most.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|[^( ]\S*) ([a-z][\w\-]*)\((.*)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(%?[\w.\-]+|\{[^}]*\})")
_CALLERS = ("while", "fusion", "call", "async", "conditional")


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
    def called(self) -> list[str]:
        """The computations that it runs."""
        return [name for names in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", names)]

    @property
    def bytes(self) -> int:
        """Of its result; of a started collective's tuple, its largest array."""
        bits = (int((re.findall(r"\d+", kind) or ["8"])[0]) for kind, _ in self.arrays)
        sizes = [n * math.prod(dims) // 8 for n, (_, dims) in zip(bits, self.arrays, strict=True)]
        return max(sizes, default=0) if self.opcode.endswith("-start") else sum(sizes)

    def attribute(self, pattern: str) -> str:
        """The pattern's group in what stands behind the operands; "" where it is not there."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""


@dataclass
class Traffic:
    """Collectives of one kind. Bytes are of the larger of operand and result, on one chip."""

    count: int = 0  # in the text
    runs: int = 0  # with every loop's trips
    bytes: int = 0
    bytes_run: int = 0


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        self.entry = ""
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                root, name, shape, opcode, rest = match.groups()
                current[name] = Instruction(name, shape, opcode, rest, bool(root))
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
        for kind, moved, times in self._collectives(self.entry, 1, trips, None):
            traffic = total.setdefault(kind, Traffic())
            traffic.count, traffic.runs = traffic.count + 1, traffic.runs + times
            traffic.bytes, traffic.bytes_run = traffic.bytes + moved, traffic.bytes_run + moved * times
        return total

    def _collectives(
        self, name: str, times: int, trips: int, fusion: Instruction | None
    ) -> Iterator[tuple[str, int, int]]:
        """(kind, bytes, how often it runs) of what is in a computation and in those that it calls."""
        computation = self.computations.get(name, {})
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not self._goes_on(i, fusion):
                operands = sum(computation[operand].bytes for operand in i.operands if operand in computation)
                scatters = fusion is not None and fusion.called[0].startswith("all-reduce-scatter")
                yield "reduce-scatter" if scatters else kind, max(i.bytes, operands), times
            again = self._trips(i, trips) if kind == "while" else 1
            for part in i.called if kind in _CALLERS else ():
                yield from self._collectives(part, times * again, trips, i if kind == "fusion" else fusion)

    @cached_property
    def _started(self) -> set[str]:
        """Channels of collectives that one fusion starts and others, perhaps in a loop, take further."""
        parts = (part for i in self.instructions() if _starts(i) for part in i.called)
        return {_channel(i) for part in parts for i in self.computations[part].values()} - {""}

    def _goes_on(self, i: Instruction, fusion: Instruction | None) -> bool:
        """Whether a collective has been counted where it was started."""
        return fusion is not None and not _starts(fusion) and _channel(i) in self._started

    def _trips(self, loop: Instruction, of_data: int) -> int:
        """How often a while loop runs at most: from 0 on, while a counter is less than a constant."""
        condition, body = (self.computations[loop.attribute(rf"{part}=%?([\w.\-]+)")] for part in ("condition", "body"))
        for i in condition.values():
            if i.opcode == "compare" and "direction=LT" in i.rest and i.shape.startswith("pred[]"):
                left, right = (condition[operand] for operand in i.operands)
                if left.opcode == "get-tuple-element" and right.opcode == "constant":
                    return -(-_number(right) // self._step(body, int(left.attribute(r"index=(\d+)"))))
        return of_data

    def _step(self, body: dict[str, Instruction], index: int) -> int:
        """What a turn adds to the counter: 2 where the compiler has put two turns into one."""
        root = next(i for i in body.values() if i.root)
        value = body[root.operands[index]] if root.opcode == "tuple" else root
        inside = self.computations[value.called[0]] if value.opcode == "fusion" else {}
        constants = (i for i in [*map(body.get, value.operands), *inside.values()] if i and i.opcode == "constant")
        added = next(constants, None)
        adds = next((i.opcode for i in inside.values() if i.root), value.opcode) == "add"
        return _number(added) if adds and added else 1


def _starts(fusion: Instruction) -> bool:
    return fusion.name.startswith("async-collective-start")


def _channel(i: Instruction) -> str:
    return i.attribute(r"channel_id=(\d+)")


def _number(constant: Instruction) -> int:
    return int(constant.rest.partition(")")[0])


# ------------------------------------------------------------------------------- what must not be


def gathered_stacks(module: Module, layers: int) -> set[str]:
    """Shapes of all-gathers of a parameter of all layers at once, `[L, ...]`: the scan should gather one at a time."""

    def stacked(dims: tuple[int, ...]) -> bool:
        wide = [d for d in dims if d != 1]
        return len(wide) >= 3 and wide[0] == layers

    gathers = (i for i in module.instructions() if i.opcode in ("all-gather", "all-gather-start"))
    return {i.shape.split("{")[0] for i in gathers if any(stacked(dims) for _, dims in i.arrays)}


def whole_logits(module: Module, tokens: int, vocab: tuple[int, ...]) -> set[str]:
    """Shapes of arrays with logits of all `tokens` of one chip at once, `[B, T, V]` in any order and grouping.

    Args:
      vocab: the vocabulary's size, complete and as one chip has it.
    """

    def logits(dims: tuple[int, ...]) -> bool:
        return any(v in dims and math.prod(dims) >= tokens * v for v in vocab)

    return {i.shape.split("{")[0] for i in module.instructions() if any(logits(dims) for _, dims in i.arrays)}
