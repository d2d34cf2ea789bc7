"""Compiles programs; what the compiler reports of each."""

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from camopd_jax.planning import hlo
from camopd_jax.planning.programs import Program

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZES = {
    "arguments": "argument",
    "outputs": "output",
    "aliased": "alias",
    "temporaries": "temp",
    "code": "generated_code",
}


@dataclass(frozen=True)
class Report:
    """A compiled program. Bytes are of one chip; all counts are of one run."""

    name: str
    runs: int  # in one step, of one batch, at most
    holds: dict[str, int]  # bytes by kind, as of `Program`
    # Bytes of "arguments", "outputs", "temporaries" and "code"; of the outputs, those "aliased" take the place of
    # donated arguments. Of a refused program, only the "temporaries" that it needs
    memory: dict[str, int]
    refused: str | None  # the compiler's message
    bytes_accessed: float | None  # by cost_analysis, which counts the body of a loop once
    collectives: dict[str, hlo.Traffic]
    seconds: float  # of compilation
    same_as: str | None = None  # an earlier program that is this one: compiled once

    @property
    def added(self) -> int:
        """Bytes of results that take no argument's place."""
        return self.memory.get("outputs", 0) - self.memory.get("aliased", 0)

    @property
    def needs(self) -> int:
        """Bytes during a call, without those that are there through the whole run."""
        return sum(self.holds.values()) + self.added + self.memory["temporaries"]


@dataclass(frozen=True)
class Peak:
    """The memory of one chip while a program runs, in bytes."""

    program: str
    bytes: int
    refused: bool  # the compiler refused the program and named only a part of what it needs

    def fits(self, hbm: float) -> bool:
        return not self.refused and self.bytes <= hbm


def peak(resident: int, reports: Sequence[Report]) -> Peak:
    """The highest peak of several programs, a refused one first; `resident`: bytes there through the whole run."""
    high = max(reports, key=lambda report: (report.refused is not None, report.needs))
    return Peak(high.name, resident + high.needs, high.refused is not None)


def compile_program(program: Program) -> Report:
    """Lowers, compiles and reads one program."""
    refused, accessed, started = None, None, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _no_compilation_cache():
        # Compiled.as_text() omits a part of what the TPU compiler makes, and there is none of a refused program.
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = program.lower().compile(compiler_options=options)
            stats = compiled.memory_analysis()
            memory = {kind: getattr(stats, f"{name}_size_in_bytes") for kind, name in SIZES.items()}
            accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused, needed = refusal(str(error))
            memory = {"temporaries": needed}
        seconds = time.perf_counter() - started
        # Jitted constants have modules of their own.
        texts = [file.read_text() for file in Path(folder).glob("*after_optimizations.txt")]
        text = max(texts, key=len) if texts or not refused else ""
    collectives, holds = hlo.Module(text).collectives(program.trips), dict(program.holds)
    return Report(program.name, program.runs, holds, memory, refused, accessed, collectives, seconds)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """A program that is read from JAX's persistent cache may come without a dump, and one that was compiled for absent
    chips cannot be read from it.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether to use it
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def refusal(text: str) -> tuple[str, int]:
    """The compiler's line on memory, and the bytes that it says are needed."""
    line = next((x for x in text.splitlines() if "Ran out of memory" in x or "RESOURCE_EXHAUSTED" in x), text)
    size = re.search(r"(?:\(|Used )([\d.]+)([KMGT]?)(?:\)| of)", line)
    return line.strip(), int(float(size[1]) * UNITS[size[2]]) if size else 0
