"""Compiles programs and writes down what the compiler says of them."""

import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax

from camopd_jax.method import loop
from camopd_jax.planning import hlo
from camopd_jax.planning.arrays import Plan, chip_bytes
from camopd_jax.planning.programs import Program
from camopd_jax.planning.topology import Topology
from camopd_jax.runtime.mesh import batch_shards

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, what takes the place of donated arguments
    temporaries: int
    code: int

    @property
    def added(self) -> int:
        """What the program needs beside its arguments."""
        return self.outputs - self.aliased + self.temporaries + self.code


@dataclass
class Report:
    """A compiled program; of one that does not fit by itself, what the compiler said."""

    name: str
    arguments: dict[str, int]  # bytes on one chip, by kind, from shapes and shardings
    beside: dict[str, int] = field(default_factory=dict)  # the same, of what is no argument
    runs: int = 1  # at most, in one step; all counts are of one
    same_as: str | None = None
    memory: Memory | None = None
    refused: str | None = None  # the compiler's word where it did not fit; no memory then
    refused_bytes: float | None = None  # the temporaries that it would need, on one chip
    largest: list[str] = field(default_factory=list)  # temporaries: size, and the arrays that take turns there
    flops: float | None = None  # by cost_analysis: each loop's body once
    bytes_accessed: float | None = None
    optimal_seconds: float | None = None
    counts: hlo.Counts = field(default_factory=hlo.Counts)  # with loops' trips
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of compilation


def compile_program(program: Program, plan: Plan, topology: Topology) -> Report:
    """Lowers, compiles and reads one program."""
    arguments = {kind: chip_bytes(tree) for kind, tree in program.arguments.items()}
    beside = {kind: chip_bytes(tree) for kind, tree in program.beside.items()}
    report = Report(program.name, arguments, beside, program.runs, program.same_as)
    if program.same_as:
        return report
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if topology.platform == "tpu" else None
        try:
            compiled = program.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled = None
            report.refused, report.refused_bytes = refusal(str(error))
        report.seconds = time.perf_counter() - started
        if compiled:
            _read_stats(report, compiled)
        text = _dumped(folder, "after_codegen") or _dumped(folder, "after_optimizations")
        if not text and compiled:
            text = compiled.as_text()
        report.largest = largest(_dumped(folder, "after_optimizations-memory-usage-report"))
    if text:
        module = hlo.Module(text)
        report.counts = module.counts(lambda loop: program.trips)
        report.findings = findings(module, program, plan)
    return report


def _read_stats(report: Report, compiled: jax.stages.Compiled) -> None:
    stats = compiled.memory_analysis()
    report.memory = Memory(
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.alias_size_in_bytes,
        stats.temp_size_in_bytes, stats.generated_code_size_in_bytes,
    )  # fmt: skip
    costs = compiled.cost_analysis() or {}
    report.flops, report.bytes_accessed = costs.get("flops"), costs.get("bytes accessed")
    optimal = costs.get("optimal_seconds", -1)
    report.optimal_seconds = optimal if optimal > 0 else None  # negative where there are loops: it does not know


def _dumped(folder: str, stage: str) -> str:
    """What the TPU compiler wrote of a stage; of several modules, of the largest. Jitted constants have their own."""
    texts = [path.read_text() for path in Path(folder).glob(f"*.{stage}.txt")]
    return max(texts, key=len, default="")


def largest(usage: str, most: int = 4) -> list[str]:
    """The largest of a chip's HBM buffers: each its size and the arrays that share it one after another."""
    lines = usage.split("Memory Space: vmem")[0].splitlines()
    rows = [line.split(";") for line in lines if re.match(r"\s+[\d.]+\w+\(\s*\d+%\);", line)]
    return [f"{row[1].strip()}: {row[4].strip()}" for row in rows[:most]]


def refusal(text: str) -> tuple[str, float | None]:
    """The compiler's first line on memory, and the bytes that it names as needed."""
    line = next((x for x in text.splitlines() if "Ran out of memory" in x or "RESOURCE_EXHAUSTED" in x), text)
    size = re.search(r"\(([\d.]+)([KMGT]?)\)", line) or re.search(r"Used ([\d.]+)([KMGT]?)", line)
    return line.strip(), float(size[1]) * UNITS[size[2]] if size else None


def findings(module: hlo.Module, program: Program, plan: Plan) -> list[str]:
    """What the program should not do and does."""
    said, model = [], plan.student.config
    tensor = plan.mesh.shape["tensor"]
    stage = program.name.split(":")[0]
    if stage in ("score", "gradient", "update"):
        for i in hlo.gathered_stacks(module, model.num_layers):
            said.append(f"gathers a parameter of all layers at once: {i.shape.split('{')[0]}")
    if stage in ("score", "gradient"):
        size = loop.score_batch(plan.config) if stage == "score" else plan.config.optimizer.micro_batch
        rows = size // batch_shards(plan.mesh)
        tokens = rows * plan.config.rollout.max_response_tokens
        vocab = model.output_vocab_size or model.vocab_size
        if tokens > model.hidden_size:  # fewer, and the head itself looks like logits
            for i in hlo.whole_logits(module, tokens, (vocab, -(-vocab // tensor))):
                said.append(f"logits of all answers at once: {i.shape.split('{')[0]}")
    return sorted(set(said))
