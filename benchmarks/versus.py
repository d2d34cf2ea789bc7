"""Compares our step with TRL and Tunix, alternating on one machine, with the same shapes.

    python -m venv peers && peers/bin/pip install torch trl==1.16.0 transformers datasets accelerate \\
        google-tunix jax flax
    python benchmarks/versus.py --peers_python=peers/bin/python --tokenizer=HF_DIR --rounds=5

TRL's DistillationTrainer does a full step (sample, score under one teacher, one AdamW update of the full-vocabulary
reverse KL). Tunix's sampler only samples: with top-p, for which it sorts the vocabulary, and greedily. All use random
weights of SmolLM2-135M's shape, whose answers have nearly the same gap. --specialised uses real models instead, whose
answers are selected as in a run, for recovery and review steps, and the cost follows. Each contender is a separate
process, so that its peak memory can be measured; every round runs each of them once. Medians over rounds are compared.
The run stops if a contender did other work than ours (tokens sampled, teacher scored, weights moved).

With --ends a full step is timed as in a run: the fine-tuned model answers full prompts, general and domain 3:1, and its
answers end by themselves. The contenders then sample different tokens, so their number is printed beside the seconds.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from prompts import tokenised
from rich import box
from rich.console import Console
from rich.table import Table

from camopd_jax.runtime.jsonl import write_rows

HERE = Path(__file__).parent
OURS = ("--score_batch=16", "--remat=rollout")  # and micro-batches of 4: best on two CPU cores

flags.DEFINE_string("peers_python", None, "Python that has TRL and Tunix installed.", required=True)
flags.DEFINE_string("tokenizer", None, "Hugging Face folder with SmolLM2's tokenizer, for the peers.", required=True)
flags.DEFINE_string("specialised", None, "Hugging Face folder of SmolLM2-135M's shape, fine-tuned.")
flags.DEFINE_string("original", None, "Hugging Face folder: what it was before.")
flags.DEFINE_string("general", None, "JSONL file of general prompts, for these two.")
flags.DEFINE_string("domain", None, "JSONL file of domain prompts, for these two.")
flags.DEFINE_integer("batch", 16, "Prompts a step.")
flags.DEFINE_integer("prompt", 64, "Tokens of every prompt.")
flags.DEFINE_integer("answer", 64, "Tokens of every answer.")
flags.DEFINE_integer("rounds", 5, "Rounds of alternation.")
flags.DEFINE_integer("steps", 2, "Timed steps of each process.")
flags.DEFINE_bool("ends", False, "Whole prompts, and answers that end by themselves; needs --specialised.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of all contenders.")
flags.DEFINE_string("out", None, "JSON file for every line that the contenders printed.")


def contenders() -> dict[str, list[str]]:
    """{name: command}."""
    v = flags.FLAGS
    ours = [sys.executable, HERE / "step.py", f"--batch={v.batch}", f"--prompt={v.prompt}", f"--answer={v.answer}",
            f"--dtype={v.dtype}", f"--steps={v.steps}", *OURS]  # fmt: skip
    # As in configs/smollm2.py; where answers end by themselves, a rate at which this model goes on ending them.
    rate = 1e-5 if v.ends else 1e-4
    real = [
        f"--model={v.specialised}",
        f"--teacher={v.original}",
        f"--general={v.general}",
        f"--domain={v.domain}",
        f"--learning_rate={rate}",
        "--teacher_dtype=bfloat16",  # as their files have it
    ]
    sizes = [f"--batch={v.batch}", f"--prompt-len={v.prompt}", f"--new-tokens={v.answer}", f"--dtype={v.dtype}",
             f"--tokenizer={v.tokenizer}"]  # fmt: skip
    trl = [v.peers_python, HERE / "peers" / "trl_distill.py", *sizes]
    if v.ends:
        ours += [*real, "--score_batch=4", "--ends", "--shrinks", "--smallest_bucket=32", "--warm_up=2",
                 "--micro_batch=4"]  # fmt: skip
        model = [f"--model={v.specialised}", f"--teacher={v.original}", f"--prompts={mixed_prompts()}",
                 f"--learning-rate={rate}"]  # fmt: skip
        return {
            "ours, every answer": [*ours, "--mass=1"],
            "ours, CaMOPD": [*ours, "--mass=0.8"],
            "TRL": [*trl, *model, f"--steps={4 * v.steps}"],
        }
    tunix = [v.peers_python, HERE / "peers" / "tunix_sample.py", *sizes, f"--repeats={v.steps}"]
    return {
        "ours, every answer": [*ours, "--mass=1", "--micro_batch=4"],
        "ours, CaMOPD": [*ours, "--mass=0.8", "--micro_batch=4", *(real if v.specialised else [])],
        "TRL": [*trl, f"--steps={v.steps}"],
        "Tunix": tunix,
        "Tunix, greedy": [*tunix, "--greedy"],
    }


def mixed_prompts() -> Path:
    """A file of the prompts that fit, in batches of a cycle's order, as our own steps read them."""
    v = flags.FLAGS

    def fitting(file: str) -> Iterator[dict]:
        rows = tokenised(file, v.specialised, v.batch)
        return itertools.cycle([row for row, ids in rows if len(ids) <= v.prompt])

    streams = [fitting(v.general)] * 3 + [fitting(v.domain)]
    batches = [list(itertools.islice(stream, v.batch)) for _ in range(v.steps + 1) for stream in streams]
    file = Path(tempfile.mkdtemp()) / "prompts.jsonl"
    write_rows(file, [{"messages": row["messages"]} for batch in batches for row in batch])
    return file


def run(command: list[str]) -> dict:
    """The JSON line that a contender prints last."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{ended.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(ended.stdout.splitlines()) if line.startswith("{")))


def sampled(line: dict) -> float:
    """Tokens that a contender sampled in a step, or in a call."""
    return line.get("tokens_sampled_per_step", line.get("tokens_sampled_per_call"))


def check_same_work(name: str, line: dict) -> None:
    """Ends the run unless the contender sampled every token, and where it trains, scored and moved its weights."""
    wanted = flags.FLAGS.batch * flags.FLAGS.answer
    if sampled(line) != wanted and not flags.FLAGS.ends:
        raise SystemExit(f"{name} sampled {sampled(line)} tokens a step, not {wanted}")
    if not name.startswith("Tunix") and not line["largest_move"] > 0:
        raise SystemExit(f"{name} moved no weight")
    if name == "TRL" and line["teacher_calls"] < flags.FLAGS.steps + 1:
        raise SystemExit(f"{name} asked its teacher {line['teacher_calls']} times")


def main(_) -> None:
    commands = contenders()
    lines: dict[str, list[dict]] = {name: [] for name in commands}
    for number in range(flags.FLAGS.rounds):
        for name, command in commands.items():
            line = run(command)
            check_same_work(name, line)
            lines[name].append(line)
            seconds = line.get("seconds_per_step", line.get("seconds_per_call"))
            print(f"round {number + 1}: {name} {seconds:.2f} s", flush=True)
    if flags.FLAGS.out:
        Path(flags.FLAGS.out).write_text(json.dumps(lines, indent=1) + "\n")

    def figures(name: str, sampling: bool) -> list[float]:
        of = {True: lambda l: l["seconds"]["recovery"]["rollout"] if "seconds" in l else l["seconds_per_call"],
              False: lambda l: l["seconds_per_step"]}[sampling]  # fmt: skip
        return [of(line) for line in lines[name]]

    def row(view: Table, name: str, sampling: bool, peer: float) -> None:
        seconds = figures(name, sampling)
        memory = statistics.median(line.get("peak_memory_gib", line.get("peak_rss_gib")) for line in lines[name])
        middle = statistics.median(seconds)
        tokens = statistics.median(map(sampled, lines[name]))
        view.add_row(
            name, f"{middle:.2f}", f"{min(seconds):.2f} - {max(seconds):.2f}", f"{peer / middle:.2f}", f"{memory:.2f}",
            f"{tokens:.0f}",
        )  # fmt: skip

    tables = [("A whole step", False, "TRL", ["TRL", "ours, every answer", "ours, CaMOPD"])]
    if "Tunix" in lines:
        tables.append(("Sampling alone", True, "Tunix", ["Tunix", "Tunix, greedy", "ours, every answer"]))
    for title, sampling, peer, names in tables:
        view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("", "median seconds", "spread", f"times {peer}", "peak GiB", "tokens"):
            view.add_column(column, justify="right" if column else "left")
        for name in names:
            row(view, name, sampling, statistics.median(figures(peer, sampling)))
        Console().print(view)


if __name__ == "__main__":
    app.run(main)
