"""Growth of the cost of a step's programs with their sizes, from the TPU compiler, without a TPU: docs/scaling.md.

    pip install '.[plan,bench]'
    python benchmarks/scaling.py --out=docs/figures      # scaling.json and a figure a sweep
    python benchmarks/scaling.py --out=docs/figures --draw_only

Each sweep changes one size; the others stay at BASE. Scoring and the gradient process full rows. Decoding computes one
token for each of eight times as many rows, with full caches (with a single row there would be no matrix product to
count). Collectives and memory are the plan's (docs/plans.md), FLOPs its arithmetic. Memory traffic is the compiler's
`cost_analysis`, which counts a loop once, and is therefore drawn only for decoding.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from absl import app, flags

from camopd_jax.config.schema import Compute, Evaluation, MeshConfig, Optimizer, RolloutConfig, TrainConfig
from camopd_jax.models.config import from_hf
from camopd_jax.planning import topology
from camopd_jax.planning.arrays import ModelShapes, plan
from camopd_jax.planning.compiling import Report, compile_program
from camopd_jax.planning.costs import PASSES, forward_flops
from camopd_jax.planning.programs import programs

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

flags.DEFINE_string("out", str(Path(__file__).parents[1] / "docs" / "figures"), "Folder of scaling.json and figures.")
flags.DEFINE_bool("draw_only", False, "Draw the figures of a scaling.json that is there.")

PROGRAMS = {"score: recovery teacher": "scoring", "gradient: recovery": "gradient", "decode": "decoding"}
COLOURS = {"scoring": "#2a64b8", "gradient": "#c2570c", "decoding": "#2f6f2f"}
SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
PROMPT = 512  # slots
ANSWERING = 8  # rows that answer, for each that is scored at one time


@dataclass(frozen=True)
class Point:
    """Sizes of a compilation: Qwen3-0.6B's layers, on v5e, parameters split over all chips (fsdp)."""

    chips: int = 8
    slots: int = 4096  # of a row, prompt and answer
    vocabulary: int = 32768
    depth: int = 4  # layers
    rows: int = 1  # a chip


BASE = Point()
SWEEPS: dict[str, tuple[int, ...]] = {
    "depth": (2, 4, 8, 16, 32),
    "chips": (1, 4, 8, 16, 64, 256),
    "slots": (1024, 4096, 12288, 36864),
    "vocabulary": (32768, 131072, 262144),
    "rows": (1, 2, 4),
}
PANELS = {
    "gflop": "GFLOP a token",
    "hbm_mb": "MB of memory traffic a token",
    "collectives": "KB of collectives a token",
    "temporaries": "GiB of temporaries on a chip",
    "seconds": "seconds to compile",
}


def compiled(point: Point) -> Iterator[tuple[str, Report, float, float]]:
    """(name, report, tokens that a chip computes in one run, FLOPs of one) of each program."""
    rows, answer = point.chips * point.rows, point.slots - PROMPT
    shape = from_hf(dict(model_type="qwen3", vocab_size=point.vocabulary, hidden_size=1024, intermediate_size=3072,
                         num_hidden_layers=point.depth, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                         tie_word_embeddings=False), context=point.slots)  # fmt: skip
    config = TrainConfig(
        "general", "specialised",
        rollout=RolloutConfig(batch_size=rows * ANSWERING, max_prompt_tokens=PROMPT, max_response_tokens=answer),
        optimizer=Optimizer(micro_batch=rows), evaluation=Evaluation(batch_size=rows),
        mesh=MeshConfig(1, point.chips, 1), compute=Compute(remat="block"),
    )  # fmt: skip
    where = topology.describe(f"v5e:{SLICES[point.chips]}")
    made = plan(config, ModelShapes({"general": shape, "specialised": shape}, (2,)), where.devices)
    forward = forward_flops(shape, 1, 0, point.slots, answer) / point.slots
    turn = forward_flops(shape, 1, point.slots - 1, point.slots, 1)
    flops = {"scoring": forward, "gradient": PASSES["block"] * forward, "decoding": turn}
    for program in programs(made):
        if name := PROGRAMS.get(program.name):
            turns = name == "decoding"
            report = compile_program(replace(program, trips=1) if turns else program)
            yield name, report, point.rows * (ANSWERING if turns else point.slots), flops[name]


def numbers(report: Report, tokens: float, flops: float) -> dict[str, Any]:
    """What is drawn. Of a program that was refused: the temporaries that it asked for."""
    moved = sum(traffic.bytes_run for traffic in report.collectives.values())
    found = {
        "gflop": flops / 1e9, "collectives": moved / tokens / 1e3,
        "temporaries": report.memory["temporaries"] / 2**30, "seconds": report.seconds, "refused": report.refused,
    }  # fmt: skip
    if report.name == "decode":  # no loop in it: one turn is what cost_analysis counts
        found["hbm_mb"] = report.bytes_accessed / tokens / 1e6
    return found


def name_of(sweep: str, size: int) -> str:
    """Of a point, in scaling.json."""
    return ", ".join(f"{name} {n}" for name, n in asdict(replace(BASE, **{sweep: size})).items())


def measure(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of all points so far, after each point; for those that are there already nothing is compiled."""
    for sweep, sizes in SWEEPS.items():
        for size in sizes:
            name = name_of(sweep, size)
            if name not in found:
                point = replace(BASE, **{sweep: size})
                found = found | {name: {program: numbers(*told) for program, *told in compiled(point)}}
                print(name, {program: round(of["seconds"]) for program, of in found[name].items()}, flush=True)
                yield found


def figure(sweep: str, found: dict[str, Any]) -> plt.Figure:
    panels = {key: title for key, title in PANELS.items() if key != "seconds" or sweep == "depth"}
    drawn, axes = plt.subplots(1, len(panels), figsize=(2.75 * len(panels), 2.6))
    sizes = [size for size in SWEEPS[sweep] if name_of(sweep, size) in found]
    for panel, (key, title) in zip(axes, panels.items(), strict=True):
        told = {program: [found[name_of(sweep, size)][program].get(key) for size in sizes] for program in COLOURS}
        told = {program: values for program, values in told.items() if None not in values}
        for program, values in told.items():
            panel.plot(sizes, values, "o-", ms=3.5, color=COLOURS[program], label=program)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{n // 1024}K" if n >= 1024 else str(n) for n in sizes])
        panel.minorticks_off()
        if key not in ("seconds", "hbm_mb") and min(min(values) for values in told.values()) > 0:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_ylim(bottom=0)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(sweep)
    axes[0].legend(fontsize=8, frameon=False)
    return drawn


def main(_) -> None:
    values = flags.FLAGS
    out = Path(values.out)
    file = out / "scaling.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for now in () if values.draw_only else measure(found):
        found = now
        file.write_text(json.dumps(found, indent=1) + "\n")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2,
                         "svg.hashsalt": "camopd_jax", "font.size": 8.5})  # fmt: skip
    for sweep in SWEEPS:
        drawn = figure(sweep, found)
        drawn.tight_layout()
        drawn.savefig(out / f"scaling_{sweep}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    app.run(main)
