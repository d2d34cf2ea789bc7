"""Collectives of a compiled program, read from its HLO text.

The text has every computation once; a collective is multiplied by the trip counts of the loops around it. A loop that
may end early counts to its bound; for a loop whose bound is data, the caller gives the most trips.
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
    rest: str  # after the opening parenthesis: operands, then attributes
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
        """The computations that it calls."""
        return [name for names in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", names)]

    @property
    def bytes(self) -> int:
        """Of its result; of a started collective's tuple, its largest array."""
        bits = (int((re.findall(r"\d+", kind) or ["8"])[0]) for kind, _ in self.arrays)
        sizes = [n * math.prod(dims) // 8 for n, (_, dims) in zip(bits, self.arrays, strict=True)]
        return max(sizes, default=0) if self.opcode.endswith("-start") else sum(sizes)

    def attribute(self, name: str) -> str:
        """An attribute's value, a number or a name; "" if there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""

    @property
    def number(self) -> int:
        """The value of an integer constant."""
        return int(self.rest.partition(")")[0])

    @property
    def starts(self) -> bool:
        """Whether it is a fusion that starts a collective, which other fusions, perhaps in a loop, continue."""
        return self.name.startswith("async-collective-start")


@dataclass
class Traffic:
    """Collectives of one kind. Bytes: the larger of operands and result, on one chip."""

    count: int = 0  # in the text
    runs: int = 0  # with all loops' trips
    bytes: int = 0  # of `count`
    bytes_run: int = 0  # of `runs`


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
        """(kind, bytes, runs) of each collective in a computation and in those that it calls."""
        computation = self.computations.get(name, {})
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            continues = fusion and not fusion.starts and i.attribute("channel_id") in self._started
            if kind in COLLECTIVES and not continues:
                operands = sum(computation[operand].bytes for operand in i.operands if operand in computation)
                scatters = fusion is not None and fusion.called[0].startswith("all-reduce-scatter")
                yield "reduce-scatter" if scatters else kind, max(i.bytes, operands), times
            again = self._trips(i, trips) if kind == "while" else 1
            for part in i.called if kind in _CALLERS else ():
                yield from self._collectives(part, times * again, trips, i if kind == "fusion" else fusion)

    @cached_property
    def _started(self) -> set[str]:
        """Channels of collectives that a fusion starts, where they are counted."""
        parts = (part for i in self.instructions() if i.starts for part in i.called)
        return {i.attribute("channel_id") for part in parts for i in self.computations[part].values()} - {""}

    def _trips(self, loop: Instruction, of_data: int) -> int:
        """The most iterations of a while loop: from 0 on, while a counter is less than a constant."""
        condition, body = (self.computations[loop.attribute(part)] for part in ("condition", "body"))
        for i in condition.values():
            if i.opcode == "compare" and "direction=LT" in i.rest and i.shape.startswith("pred[]"):
                left, right = (condition[operand] for operand in i.operands)
                if left.opcode == "get-tuple-element" and right.opcode == "constant":
                    return -(-right.number // self._step(body, int(left.attribute("index"))))
        return of_data

    def _step(self, body: dict[str, Instruction], index: int) -> int:
        """What an iteration adds to the counter: 2 where the compiler has unrolled the loop by two."""
        root = next(i for i in body.values() if i.root)
        value = body[root.operands[index]] if root.opcode == "tuple" else root
        inside = self.computations[value.called[0]] if value.opcode == "fusion" else {}
        constants = (i for i in [*map(body.get, value.operands), *inside.values()] if i and i.opcode == "constant")
        added = next(constants, None)
        adds = next((i.opcode for i in inside.values() if i.root), value.opcode) == "add"
        return added.number if adds and added else 1
