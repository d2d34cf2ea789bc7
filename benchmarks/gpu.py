"""Everything that one GPU can say about this program, in one command of a few minutes.

    bash benchmarks/gpu.sh gpu.jsonl
    python benchmarks/gpu.py --out=gpu.jsonl
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --small

Runs the parts below one after another, each in a process of its own with a time limit, so that one that fails or hangs
spoils no other; what no longer fits into --seconds is skipped and named. Writes a line of JSON for every part as soon
as it ends, with the device's name, and prints one table last. --small uses tiny shapes, to try the script itself.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import app, flags
from rich import box
from rich.console import Console
from rich.table import Table

from camopd_jax.runtime.jsonl import read_rows

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "configs/quickstart.py"

flags.DEFINE_string("out", None, "JSON lines file, to which the results are added.")
flags.DEFINE_integer("seconds", 360, "For all parts together.", 1)
flags.DEFINE_bool("small", False, "Tiny shapes.")
flags.DEFINE_list("only", [], "Only the parts whose names begin with one of these.")
flags.DEFINE_string("peers_python", None, "Python with TRL (benchmarks/versus.py); default: without TRL.")
flags.DEFINE_string("tokenizer", None, "Hugging Face folder with SmolLM2's tokenizer, for TRL.")


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    limit: int  # seconds
    command: tuple[str | Path, ...]
    prediction: str = ""  # what the part decides, and what is expected
    environment: dict[str, str] = field(default_factory=dict)


def step(name: str, shape: str, *options: str, prediction: str = "") -> Part:
    """A part that times full steps."""
    small = ("--shape=tiny", "--batch=4", "--prompt=16", "--answer=16", "--micro_batch=2")
    command = (sys.executable, HERE / "step.py", "--mass=1", "--dtype=bfloat16", "--steps=2")
    options = (f"--shape={shape}", *options)
    if flags.FLAGS.small:  # the shape and the sizes are the tiny ones; other options stay
        options = (*(o for o in options if o.partition("=")[0] not in {s.partition("=")[0] for s in small}), *small)
    return Part(f"step {name}", 90, (*command, *options), prediction)


def parts() -> list[Part]:
    """By value: what is known least comes first."""
    v, python = flags.FLAGS, sys.executable
    families = ("--families=qwen3,gemma2",) if v.small else ()
    long = ("--prompt=128", "--answer=512")
    small = ("--small",) if v.small else ()
    several = [
        Part("families", 120, (python, HERE / "families.py", *families), "float32 within 1e-4 of torch"),
        Part("quickstart", 120, (python, __file__, "quickstart", *small), "first step within 30 s, all within 60 s"),
        Part("resume", 120, (python, __file__, "resume"), "killed and continued: the same export, byte for byte"),
        Part("tests", 90, (python, __file__, "tests", *small), "all pass: kernels, int8, experts, host memory"),
        step("1.7B batch 64", "qwen3-1.7b", "--batch=64", *long, prediction="gradient below 1.30 s (1.39 before)"),
        step("1.7B dots 16", "qwen3-1.7b", "--batch=64", "--micro_batch=16", "--remat=dots", *long,
             prediction="gradient below 1.08 s (1.16 before)"),
        step("1.7B auto", "qwen3-1.7b", "--batch=64", "--remat=auto", "--micro_batch=0", *long,
             prediction="dots in micro-batches of 64, no slower than any other"),
        step("1.7B larger chunks", "qwen3-1.7b", "--batch=64", "--logits_chunk=1024", *long,
             prediction="gradient 0.04 s below that of batch 64"),
        step("1.7B cache kernel", "qwen3-1.7b", "--batch=64", "--decode_attention=fused", *long,
             prediction="rollout below 1.3 s (1.63 before), if attention over the cache takes the time of its bytes"),
        step("1.7B float32", "qwen3-1.7b", "--batch=64", "--dtype=float32", *long, prediction="about 8 times bfloat16"),
        step("0.6B batch 64", "qwen3-0.6b", "--batch=64", *long),
        step("135M batch 64", "smollm2-135m", "--batch=64", *long),
        step("1.7B batch 256", "qwen3-1.7b", "--batch=256", *long, prediction="decoding nearer to the bandwidth"),
        step("1.7B offload late", "qwen3-1.7b", "--batch=64", "--offload=late", *long),
        step("1.7B offload ahead", "qwen3-1.7b", "--batch=64", "--offload=ahead", *long),
        step("0.6B answers 2048", "qwen3-0.6b", "--batch=64", "--prompt=128", "--answer=2048"),
    ]  # fmt: skip
    if v.peers_python:
        trl = (v.peers_python, HERE / "peers/trl_distill.py", "--tokenizer", v.tokenizer or "", "--dtype", "bfloat16")
        sizes = ("--batch", "4", "--new-tokens", "16") if v.small else ("--batch", "64", "--new-tokens", "512")
        several.insert(5, Part("TRL 135M", 90, (*trl, *sizes, "--steps", "1")))
    if v.peers_python and imports(v.peers_python, "vllm"):
        sizes = ("--shape", "tiny", "--batch", "4", "--new-tokens", "16") if v.small else ("--shape", "qwen3-1.7b")
        several.insert(6, Part("vLLM 1.7B", 120, (v.peers_python, HERE / "peers/vllm_sample.py", *sizes),
                               "sampling alone: 42 to 50 % of the bandwidth in published runs"))  # fmt: skip
    return [part for part in several if not v.only or part.name.startswith(tuple(v.only))]


def imports(python: str, module: str) -> bool:
    """Whether a Python has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------- the parts of a run


def train(workdir: Path, *options: str, steps: int = 8) -> subprocess.Popen[bytes]:
    """A quickstart without evaluations, started."""
    own = (f"--config={QUICKSTART}", f"--workdir={workdir}", f"--config.steps={steps}", "--config.log.report=false",
           "--config.evaluation.benchmarks=()", "--config.checkpoints.every=2")  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "camopd_jax.train", *own, *options], stdout=sys.stderr)


def quickstart() -> dict[str, Any]:
    """Seconds until the first steps and the end of the quickstart, of a second start too, with compiled programs."""
    seconds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        for start in ("first", "second"):
            workdir, started = Path(folder) / start, time.perf_counter()
            process = train(workdir, steps=8 if flags.FLAGS.small else 240)
            while process.poll() is None and not (workdir / "metrics.jsonl").exists():
                time.sleep(0.1)
            seconds[f"{start}_step"] = round(time.perf_counter() - started, 1)
            if process.wait():
                raise RuntimeError(f"train ended with exit code {process.returncode}")
            seconds[f"{start}_run"] = round(time.perf_counter() - started, 1)
    return seconds


def resume() -> dict[str, Any]:
    """Whether a run that was killed after two steps ends with the export of one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        through, killed = Path(folder) / "through", Path(folder) / "killed"
        if train(through).wait():
            raise RuntimeError("train failed")
        process = train(killed)
        while process.poll() is None and not any((killed / "checkpoints").glob("[0-9]*")):
            time.sleep(0.05)
        at = len(read_rows(killed / "metrics.jsonl"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if train(killed).wait():
            raise RuntimeError("the killed run could not continue")
        same = [(one / "export/model.safetensors").read_bytes() for one in (through, killed)]
        return {"killed_after_step": at, "same_bytes": same[0] == same[1]}


def tests() -> dict[str, Any]:
    """How many of the tests marked `gpu` pass on this device."""
    platform = "cpu" if flags.FLAGS.small else "cuda"
    command = (sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", "tests")
    environment = os.environ | {"CAMOPD_TEST_PLATFORM": platform}
    ended = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    last = ended.stdout.strip().splitlines()[-1:]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", "".join(last))}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)
    return counts | ({"which": failed} if failed else {})


# ---------------------------------------------------------------------------------------------- the runner


def run(part: Part, limit: float) -> dict[str, Any]:
    """The part's result: of its JSON lines, the last, or all of them; or why there is none."""
    started = time.perf_counter()
    environment = os.environ | part.environment
    # In a session of its own: with a process that hangs, its children are killed too.
    process = subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    result: dict[str, Any] = {"part": part.name}
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        result["error"] = f"stopped after {limit:.0f} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if process.returncode and "error" not in result:
        result["error"] = " / ".join(errors.strip().splitlines()[-2:])[-300:] or f"exit code {process.returncode}"
    result |= lines[0] if len(lines) == 1 else {"lines": lines}
    return result | {"part_seconds": round(time.perf_counter() - started, 1), "prediction": part.prediction}


def summary(result: dict[str, Any]) -> str:
    """A result in a cell of the table."""
    texts: list[str] = []
    if lines := result.get("lines"):
        failed = [line["family"] for line in lines if "error" in line or line.get("float32", 1) > 1e-4]
        exact, rounded = (max(line.get(name, 0) for line in lines) for name in ("float32", "bfloat16_mean"))
        texts.append(f"{len(lines)} families, float32 {exact:.2g}, bfloat16 mean {rounded:.2g} nats")
        texts += [f"FAILED: {', '.join(failed)}"] if failed else []
    if isinstance(seconds := result.get("seconds"), dict):
        stages = ", ".join(f"{stage} {s:.3f}" for stage, s in seconds["recovery"].items())
        chosen = f"remat {result['remat']}, micro-batch {result['micro_batch']}"
        texts.append(f"step {result['seconds_per_step']:.2f} s ({chosen}): {stages}")
        mfu = result["mfu"]
        texts.append(f"decoding {result['decode_of_bandwidth']:.1%} of bandwidth, gradient {mfu['gradient']:.0%} MFU")
        texts.append(f"compiled in {result['warm_up_seconds']:.0f} s, peak {result['peak_memory_gib']:.1f} GiB")
    known = ("lines", "seconds", "part", "part_seconds", "prediction", "device", "error")
    if not texts:
        texts += [f"{name} {value}" for name, value in result.items() if name not in known]
    return "\n".join([*texts, *([f"ERROR: {result['error']}"] if "error" in result else [])])


def table(results: Iterable[dict[str, Any]], device: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=device)
    for column in ("part", "result", "prediction", "s"):
        out.add_column(column)
    for result in results:
        out.add_row(result["part"], summary(result), result.get("prediction", ""), str(result.get("part_seconds", "-")))
    return out


def device() -> str:
    """The name of the device, asked in a process that ends: one that stays would keep its memory."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:  # one of the parts, in its own process
        print(json.dumps({"quickstart": quickstart, "resume": resume, "tests": tests}[arguments[1]]()), flush=True)
        return
    v, started, name, results = flags.FLAGS, time.perf_counter(), device(), []
    for part in parts():
        left, limit = v.seconds - (time.perf_counter() - started), part.limit * (5 if v.small else 1)  # a CPU is slow
        result = run(part, min(limit, left)) if left > 5 else {"part": part.name, "error": "no time was left"}
        results.append(result | {"device": name})
        print(f"{part.name}: {result.get('error', 'done')} ({result.get('part_seconds', 0)} s)", flush=True)
        if v.out:
            with Path(v.out).open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    Console(width=max(100, shutil.get_terminal_size().columns), highlight=False).print(table(results, name))


if __name__ == "__main__":
    app.run(main)
