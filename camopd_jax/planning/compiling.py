"""Compiles programs and writes down what the compiler says of them."""

import dataclasses
import re
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import jax

from camopd_jax.planning import hlo
from camopd_jax.planning.arrays import Plan, chip_bytes
from camopd_jax.planning.programs import Program
from camopd_jax.rollout.head import tokens_at_once
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


@dataclass
class Report:
    """A compiled program; of one that does not fit by itself, what the compiler said."""

    name: str
    holds: dict[str, int]  # bytes on one chip, by kind
    runs: int  # in one step, at most; all counts are of one
    same_as: str | None = None  # an earlier program that is this one: compiled once
    memory: Memory | None = None
    refused: str | None = None  # the compiler's words where it did not fit; no memory then
    refused_bytes: float = 0.0  # the temporaries that it would need, on one chip
    flops: float | None = None  # of one chip, by cost_analysis: each loop's body once
    bytes_accessed: float | None = None  # the same
    collectives: dict[str, hlo.Traffic] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of compilation


def compile_all(programs: Iterable[Program], plan: Plan) -> Iterator[Report]:
    """A report of each program. Those that are the same are compiled once."""
    compiled: dict[Hashable, Report] = {}
    for program in programs:
        holds = {kind: chip_bytes(tree) for kind, tree in program.holds.items()}
        first = compiled.get(program.key)
        if first is None:
            first = compiled[program.key] = compile_program(program, plan)
            yield dataclasses.replace(first, holds=holds)
        else:
            same = {"name": program.name, "holds": holds, "runs": program.runs}
            yield dataclasses.replace(first, **same, same_as=first.name, warnings=[])


def compile_program(program: Program, plan: Plan) -> Report:
    """Lowers, compiles and reads one program."""
    report = Report(program.name, {kind: chip_bytes(tree) for kind, tree in program.holds.items()}, program.runs)
    started = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        report.refused, report.refused_bytes = refusal(str(error))
        return report
    finally:
        report.seconds = time.perf_counter() - started
    stats, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    report.memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    report.flops, report.bytes_accessed = costs.get("flops"), costs.get("bytes accessed")
    module = hlo.Module(compiled.as_text())
    report.collectives = module.collectives(program.trips)
    report.warnings = warnings(module, program, plan)
    return report


def refusal(text: str) -> tuple[str, float]:
    """The compiler's line on memory, and the bytes that it names as needed."""
    line = next((x for x in text.splitlines() if "Ran out of memory" in x or "RESOURCE_EXHAUSTED" in x), text)
    size = re.search(r"\(([\d.]+)([KMGT]?)\)", line) or re.search(r"Used ([\d.]+)([KMGT]?)", line)
    return line.strip(), float(size[1]) * UNITS[size[2]] if size else 0.0


def warnings(module: hlo.Module, program: Program, plan: Plan) -> list[str]:
    """What the program should not do and does."""
    stage, model, setup = program.name.split(":")[0], plan.student.config, plan.setup
    lines, tensor = [], setup.mesh.shape["tensor"]
    if stage in ("score", "gradient", "update"):
        for i in hlo.gathered_stacks(module, model.num_layers):
            lines.append(f"gathers a parameter of all layers at once: {i.shape.split('{')[0]}")
    if stage in ("score", "gradient"):
        size = setup.score_batch if stage == "score" else setup.config.optimizer.micro_batch
        rows, vocab = size // batch_shards(setup.mesh), model.output_vocab_size or model.vocab_size
        tokens = rows * setup.config.rollout.max_response_tokens
        chunk = max(rows, tokens_at_once(setup.config.compute.logits_chunk, vocab, tensor))
        if tokens > max(chunk, model.hidden_size):  # of fewer, the head itself looks like logits
            for i in hlo.whole_logits(module, tokens, (vocab, -(-vocab // tensor))):
                lines.append(f"logits of all answers at once: {i.shape.split('{')[0]}")
    return sorted(set(lines))
