"""Compiles programs and writes down what the compiler says of them."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax

from camopd_jax.planning import hlo
from camopd_jax.planning.arrays import Plan, chip_bytes
from camopd_jax.planning.programs import Program
from camopd_jax.rollout.head import tokens_at_once
from camopd_jax.runtime.mesh import batch_shards

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass
class Report:
    """A compiled program. Bytes are of one chip; all counts are of one run."""

    name: str
    holds: dict[str, int]  # bytes by kind
    runs: int  # in one step, at most
    same_as: str | None = None  # an earlier program that is this one: compiled once
    # Bytes of "arguments", "outputs", "temporaries" and "code"; of the outputs, those "aliased" take the place of
    # donated arguments. None: the compiler refused
    memory: dict[str, int] | None = None
    refused: str | None = None  # its words
    refused_bytes: float = 0.0  # the temporaries that it would need
    flops: float | None = None  # by cost_analysis: each loop's body once
    bytes_accessed: float | None = None  # the same
    collectives: dict[str, hlo.Traffic] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of compilation

    @property
    def added(self) -> int:
        """Bytes of results that take no argument's place."""
        return self.memory["outputs"] - self.memory["aliased"] if self.memory else 0

    @property
    def temporaries(self) -> float:
        return self.memory["temporaries"] if self.memory else self.refused_bytes


def compile_all(programs: Iterable[Program], plan: Plan) -> Iterator[Report]:
    """A report of each program. Those that are the same are compiled once."""
    compiled: dict[Hashable, Report] = {}
    for program in programs:
        if first := compiled.get(program.key):
            name, holds, runs = program.name, _held(program), program.runs
            yield dataclasses.replace(first, name=name, holds=holds, runs=runs, same_as=first.name, warnings=[])
        else:
            compiled[program.key] = compile_program(program, plan)
            yield compiled[program.key]


def _held(program: Program) -> dict[str, int]:
    return {kind: chip_bytes(tree) for kind, tree in program.holds.items()}


def compile_program(program: Program, plan: Plan) -> Report:
    """Lowers, compiles and reads one program."""
    report, started = Report(program.name, _held(program), program.runs), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # Compiled.as_text() does not write all that the TPU's compiler makes, and there is none of a refused program.
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = program.lower().compile(compiler_options=options)
            stats, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
            names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
            names["code"] = "generated_code"
            report.memory = {kind: getattr(stats, f"{name}_size_in_bytes") for kind, name in names.items()}
            report.flops, report.bytes_accessed = costs.get("flops"), costs.get("bytes accessed")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            report.refused, report.refused_bytes = refusal(str(error))
        report.seconds = time.perf_counter() - started
        # Jitted constants have modules of their own.
        texts = (file.read_text() for file in Path(folder).glob("*after_optimizations.txt"))
        module = hlo.Module(max(texts, key=len, default=""))
    report.collectives, report.warnings = module.collectives(program.trips), warnings(module, program, plan)
    return report


def refusal(text: str) -> tuple[str, float]:
    """The compiler's line on memory, and the bytes that it names as needed."""
    line = next((x for x in text.splitlines() if "Ran out of memory" in x or "RESOURCE_EXHAUSTED" in x), text)
    size = re.search(r"\(([\d.]+)([KMGT]?)\)", line) or re.search(r"Used ([\d.]+)([KMGT]?)", line)
    return line.strip(), float(size[1]) * UNITS[size[2]] if size else 0.0


def warnings(module: hlo.Module, program: Program, plan: Plan) -> list[str]:
    """What the program should not do and does."""
    stage, model, setup = program.name.split(":")[0], plan.student.config, plan.setup
    stacks, logits, vocab = set(), set(), model.output_vocab_size or model.vocab_size
    if stage in ("score", "gradient", "update"):
        stacks = hlo.gathered_stacks(module, model.num_layers)
    if stage in ("score", "gradient"):
        size = setup.score_batch if stage == "score" else setup.config.optimizer.micro_batch
        rows, tensor = size // batch_shards(setup.mesh), setup.mesh.shape["tensor"]
        tokens = rows * setup.config.rollout.max_response_tokens
        at_once = max(rows, tokens_at_once(setup.config.compute.logits_chunk, vocab, tensor))
        if tokens > max(at_once, model.hidden_size):  # of fewer, the head itself looks like logits
            logits = hlo.whole_logits(module, tokens, (vocab, -(-vocab // tensor)))
    return [f"gathers a stacked parameter of all layers at once: {shape}" for shape in sorted(stacks)] + [
        f"logits of all answers at once: {shape}" for shape in sorted(logits)
    ]
