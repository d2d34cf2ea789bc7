"""What a compiled program does, read from its HLO text: loops, collectives, matrix products, the compiler's cycles.

The text names every computation once; a loop's body runs as often as its condition says. Here every count is
multiplied by the loops around it. Where a loop's trips depend on data (micro-batches of the selected answers) the
caller says how many; where it may end early (a turn of decoding) its bound is taken, which is the worst case.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_START = "async-collective-start"
_REDUCE_SCATTER = "all-reduce-scatter"  # how the TPU compiler calls a fusion that is one
BRANCHES = ("branch_computations", "true_computation", "false_computation")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
         "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+|c\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # an array's or a tuple's, as written
    opcode: str
    operands: tuple[str, ...]
    inner: str  # between the parentheses: a parameter's or constant's value
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(type, dimensions) of every array of its result."""
        return tuple((kind, tuple(map(int, dims.split(","))) if dims else ())
                     for kind, dims in _ARRAY.findall(self.shape))  # fmt: skip

    def called(self, *names: str) -> list[str]:
        """Computations under these attributes."""
        found: list[str] = []
        for name in names:
            for one, many in re.findall(rf"\b{name}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes):
                found += [part.strip().lstrip("%") for part in (one or many).split(",")]
        return found


@dataclass(frozen=True)
class Loop:
    """A while loop as it stands in the text."""

    source: str  # where it comes from in the Python program, as JAX names it
    trips: int | None  # None: its bound is data
    exact: bool  # False: it may end earlier


@dataclass
class Traffic:
    """Collectives of one kind. Bytes are of the larger of operand and result, on one chip."""

    count: int = 0  # in the text
    runs: int = 0  # with every loop's trips
    bytes: int = 0
    bytes_run: int = 0


@dataclass
class Counts:
    """Of one chip, over one run of the program."""

    collectives: dict[str, Traffic] = field(default_factory=dict)
    flops: float = 0.0  # of matrix products, a fused attention's counted by formula
    cycles: float = 0.0  # the compiler's own estimates, added up: nothing overlaps; it has none for Pallas kernels
    busiest: dict[str, int] = field(default_factory=dict)  # bytes of collectives, by kind and place in the program
    slowest: dict[str, float] = field(default_factory=dict)  # cycles, by the innermost loop around them
    loops: list[Loop] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)  # loops whose trips the caller gave


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in re.sub(r'\n(?="|}})', " ", text).splitlines():  # a kernel's metadata stands on lines of its own
            if line[:1] not in ("", " ", "}") and line.rstrip().endswith("{") and "->" in line:
                name = line.removeprefix("ENTRY ").split(" (")[0].strip().lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif line.startswith(" ") and " = " in line:
                found = _instruction(line)
                current[found.name] = found

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def counts(self, trips: Callable[[Loop], int] = lambda loop: 1) -> Counts:
        """Everything counted; `trips` is asked for the loops whose bound is data."""
        counts = Counts()
        self._walk(self.entry, 1, counts, trips, "outside of loops")
        return counts

    @cached_property
    def _started(self) -> set[str]:
        """Channels of collectives that a fusion starts and others, perhaps in a loop, take further: one collective."""
        starts = [
            i for i in self.instructions() if i.opcode == "fusion" and i.name.startswith("async-collective-start")
        ]
        inside = (c for i in starts for part in i.called("calls") for c in self.computations[part].values())
        return {channel for c in inside if (channel := _channel(c))}

    def _walk(
        self,
        name: str,
        times: int,
        counts: Counts,
        trips: Callable[[Loop], int],
        inside: str,
        fusion: Instruction | None = None,
    ) -> None:
        computation = self.computations[name]
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                goes_on = fusion is not None and not fusion.name.startswith(_START)
                if goes_on and _channel(i) in self._started:
                    continue
                if fusion is not None and any(
                    part.startswith(_REDUCE_SCATTER) for part in fusion.called("calls")
                ):  # an all-reduce of which this chip keeps its part
                    kind = "reduce-scatter"
                moved = max(_bytes(i), sum(_bytes(computation[o]) for o in i.operands if o in computation))
                traffic = counts.collectives.setdefault(kind, Traffic())
                traffic.count, traffic.runs = traffic.count + 1, traffic.runs + times
                traffic.bytes, traffic.bytes_run = traffic.bytes + moved, traffic.bytes_run + moved * times
                place = f"{kind} in {_place(i)}"
                counts.busiest[place] = counts.busiest.get(place, 0) + moved * times
            elif kind in ("convolution", "dot"):
                counts.flops += times * _product_flops(i, computation)
            elif kind == "custom-call":
                counts.flops += times * _kernel_flops(i, computation)
            if fusion is None and (cycles := _cycles(i)):
                counts.cycles += times * cycles
                counts.slowest[inside] = counts.slowest.get(inside, 0) + times * cycles
            if kind == "while":
                loop = self.loop(i, computation)
                counts.loops.append(loop)
                n = loop.trips
                if n is None:
                    n = trips(loop)
                    counts.guessed.append(f"{loop.source} x {n}")
                for part in i.called("body", "condition"):
                    self._walk(part, times * n, counts, trips, loop.source, fusion)
            elif kind == "fusion":
                for part in i.called("calls"):
                    self._walk(part, times, counts, trips, inside, i)
            elif kind in ("call", "async", "conditional"):
                for part in i.called(
                    "calls", "to_apply", "branch_computations", "true_computation", "false_computation"
                ):
                    self._walk(part, times, counts, trips, inside, fusion)

    def loop(self, loop: Instruction, around: dict[str, Instruction]) -> Loop:
        """How often a while loop runs: `counter < bound`, perhaps with more conditions that may end it earlier."""
        name = _place(loop)
        condition = self.computations[loop.called("condition")[0]]
        found = _less_than(condition)
        if found is None:
            return Loop(name, None, False)
        compare, index, bound = found
        step = self._step(self.computations[loop.called("body")[0]], index)
        return Loop(name, max(0, -(-(bound - self._start(loop, index, around)) // step)), compare.root)

    def _step(self, body: dict[str, Instruction], index: int) -> int:
        """What a turn adds to the counter: 2 where the compiler has put two turns into one."""
        root = next(i for i in body.values() if i.root)
        if root.opcode != "tuple":
            return 1
        value, given = body[root.operands[index]], body
        if value.opcode == "fusion":
            inside = self.computations[value.called("calls")[0]]
            outside = [body[name] for name in value.operands]
            given = {i.name: outside[int(i.inner)] if i.opcode == "parameter" else i for i in inside.values()}
            value = next(i for i in inside.values() if i.root)
        steps = [int(i.inner) for i in map(given.get, value.operands) if i is not None and i.opcode == "constant"]
        return steps[0] if value.opcode == "add" and steps else 1

    def _start(self, loop: Instruction, index: int, around: dict[str, Instruction]) -> int:
        """The counter's value before the loop. One that an earlier loop left stands at that loop's bound."""
        carried = around.get(loop.operands[0])
        if carried is None or carried.opcode != "tuple":
            return 0
        value = around.get(carried.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            value = around.get(value.operands[0])
        if value is None:
            return 0
        if value.opcode == "constant":
            return int(value.inner)
        source = around.get(value.operands[0]) if value.opcode == "get-tuple-element" else None
        if source is not None and source.opcode == "while":
            earlier = _less_than(self.computations[source.called("condition")[0]])
            return earlier[2] if earlier else 0
        return 0


def _less_than(condition: dict[str, Instruction]) -> tuple[Instruction, int, int] | None:
    """(comparison, index of the counter, bound) of a loop's condition, where the bound is a constant."""
    for i in condition.values():
        if i.opcode == "compare" and "direction=LT" in i.attributes and i.shape.startswith("pred[]"):
            left, right = (condition[o] for o in i.operands)
            if left.opcode == "get-tuple-element" and right.opcode == "constant":
                return i, int(re.search(r"index=(\d+)", left.attributes)[1]), int(right.inner)
    return None


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _balanced(right, 0) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opcode, _, _ = right.partition("(")
    close = _balanced(right, len(opcode))
    inner = right[len(opcode) + 1 : close - 1]
    root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").strip().lstrip("%")
    return Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inner)), inner, right[close:], root)


def _balanced(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _cycles(i: Instruction) -> int:
    """The compiler's estimate; 0 where it has none, or has given up and says the largest number there is."""
    found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return int(found[1]) if found and int(found[1]) < 2**62 else 0


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.attributes)
    return found and found[1]


def _place(i: Instruction) -> str:
    """Where an instruction comes from in the Python program, as JAX names it."""
    source = re.search(r'op_name="([^"]*)"', i.attributes)
    return source[1] if source else re.sub(r"\{[^}]*\}", "", i.shape)  # made by the compiler: then what it makes


def _bytes(i: Instruction) -> int:
    """Of an instruction's result; of a started collective's tuple, its largest array."""
    sizes = [_BITS.get(kind, 8) * math.prod(dims) // 8 for kind, dims in i.arrays]
    return max(sizes, default=0) if i.opcode.endswith("-start") else sum(sizes)


def _product_flops(i: Instruction, computation: dict[str, Instruction]) -> float:
    """2 x result's elements x elements summed over in each."""
    result = math.prod(i.arrays[0][1])
    left, right = (computation[o].arrays[0][1] for o in i.operands[:2])
    if i.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return 2.0 * result * math.prod(left[int(d)] for d in summed[1].split(",") if d)
    of_left, of_kernel, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    windows = re.search(r"window=\{([^}]*)\}", i.attributes)
    given = dict(entry.split("=") for entry in windows[1].split()) if windows else {}
    features = right[of_kernel.index("o")] * right[of_kernel.index("i")]
    pairs = 1
    for dim in (label for label in of_left if label.isdigit()):
        window = {name: values.split("x")[int(dim)] for name, values in given.items()}
        pairs *= _pairs(left[of_left.index(dim)], i.arrays[0][1][of_result.index(dim)], window)
    return 2.0 * left[of_left.index("b")] * features * pairs


def _kernel_flops(i: Instruction, computation: dict[str, Instruction]) -> float:
    """Of a fused attention kernel, by formula: its products run over the query-key pairs that its place names.

    Two in the forward kernel (scores, output), three for the queries' gradient, four for the keys' and values'.
    """
    kernel = re.search(r"attention_of_(\d+)_pairs_(\d+)_wide.*splash_mha_(fwd|dq|dkv)_", _place(i))
    if kernel is None:
        return 0.0
    pairs, width, products = int(kernel[1]), int(kernel[2]), {"fwd": 2, "dq": 3, "dkv": 4}[kernel[3]]
    parts = (i, *(computation[o] for o in i.operands if o in computation))
    shapes = (dims for part in parts for _, dims in part.arrays if len(dims) > 2 and dims[-1] == width)
    return 2.0 * products * pairs * width * max(math.prod(dims[:-2]) for dims in shapes)  # of all rows and heads


def _pairs(inputs: int, outputs: int, window: dict[str, str]) -> int:
    """How many (output, kernel) places of one dimension meet a real input. A batch of products is written as a
    convolution with so much dilation that each output meets one place alone.
    """
    size, stride, dilation = int(window.get("size", 1)), int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    before, spread = int(window.get("pad", "0_0").split("_")[0]), int(window.get("rhs_dilate", 1))
    if dilation == 1 and before == 0 and (outputs - 1) * stride + (size - 1) * spread < inputs:
        return outputs * size
    starts = np.arange(outputs) * stride - before
    places = (starts + j * spread for j in range(size))
    return sum(int(np.sum((p >= 0) & (p <= (inputs - 1) * dilation) & (p % dilation == 0))) for p in places)


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
      vocab: the vocabulary's size, whole and as one chip's share.
    """

    def logits(dims: tuple[int, ...]) -> bool:
        return any(v in dims and math.prod(dims) >= tokens * v for v in vocab)

    return [i for i in module.instructions() if any(logits(dims) for _, dims in i.arrays)]
