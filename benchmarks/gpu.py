"""Everything that one GPU can say about this program, in one command of a few minutes.

    bash benchmarks/gpu.sh gpu.jsonl
    python benchmarks/gpu.py --out=gpu.jsonl
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --small

Runs the parts below, each in a process of its own with a time limit, so that one that fails or hangs spoils no other.
They run one after another, except checks that time nothing. A part that no longer fits into --seconds by its predicted
time is not run, and named; --seconds=2100 is enough for all. Writes a line of JSON for every part as soon as it ends,
with the device's name, and prints one table last. --small uses tiny shapes, to try the script itself.
"""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from absl import app, flags
from rich import box
from rich.console import Console
from rich.table import Table

from camopd_jax.runtime.jsonl import read_rows

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "configs/quickstart.py"
TOKENIZER = HERE.parent / "examples/quickstart/generalist"
SHAPE = {"1.7B": "qwen3-1.7b", "0.6B": "qwen3-0.6b", "135M": "smollm2-135m"}
# With --small: most of the time would be the compiler's optimisation, for programs that run twice.
QUICKLY_COMPILED = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
OUT_OF_TIME = "out of time"
SHORT = ("--config.steps=4", "--config.log.report=false", "--config.evaluation.benchmarks=()",
         "--config.checkpoints.every=2")  # fmt: skip
# Of checks, which run beside each other: they time nothing, and so need neither the quickest kernels nor all memory.
UNTUNED = {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

flags.DEFINE_string("out", None, "JSON lines file, to which the results are added.")
flags.DEFINE_integer("seconds", 360, "For all parts together.", 1)
flags.DEFINE_bool("small", False, "Tiny shapes.")
flags.DEFINE_list("only", [], "Only the parts whose names begin with one of these.")
flags.DEFINE_string("peers_python", None, "Python with TRL (benchmarks/versus.py); default: without TRL.")
flags.DEFINE_string("tokenizer", str(TOKENIZER), "Hugging Face folder with a tokenizer, for TRL.")


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    seconds: int  # predicted on an H200: it does not start with less time left, and is stopped after twice as many
    command: tuple[str | Path, ...]
    prediction: str = ""  # what the part decides, and what is expected
    beside: bool = False  # whether it runs at the same time as its neighbours: a check, of which no time counts
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str = ""  # why it cannot run here; "": it can


def step(model: str, sizes: str, seconds: int, *options: str, prediction: str = "", not_run: str = "") -> Part:
    """A part that times full steps.

    Args:
      sizes: "B x T", a batch of B answers of T tokens, and after a comma a name for the options.
    """
    command = (sys.executable, HERE / "step.py", "--mass=1", "--dtype=bfloat16", "--steps=1", "--prompt=128")
    batch, answer = sizes.partition(",")[0].split(" x ")
    options = (f"--shape={SHAPE[model]}", f"--batch={batch}", f"--answer={answer}", *options)
    if flags.FLAGS.small:
        options = (*options, *_small(int(batch), int(answer), "--micro_batch=0" in options))
    quickly = flags.FLAGS.small and int(answer) <= 512  # long answers are computed slowly without optimisation
    environment = QUICKLY_COMPILED if quickly else {}
    return Part(f"step {model} {sizes}", seconds, (*command, *options), prediction, False, environment, not_run)


def _small(batch: int, answer: int, auto: bool) -> tuple[str, ...]:
    """Options of the same part on a CPU: a batch of 256 and answers of 2,048 tokens stay, unless both are given."""
    batch, answer = batch if batch > 64 and answer <= 512 else min(4, batch // 32), answer if answer > 512 else 16
    rows = 0 if auto else 16 if batch > 64 else 2
    sizes = {"shape": "tiny", "layers": 1, "batch": batch, "prompt": 16, "answer": answer, "micro_batch": rows}
    return tuple(f"--{name}={value}" for name, value in (sizes | {"limits_width": 256}).items())


def parts() -> list[Part]:
    """In the order in which they run: what is known least, or decides most, comes first."""
    v, python = flags.FLAGS, sys.executable
    families = ("--families=qwen3,gemma2",) if v.small else ()
    small = ("--small",) if v.small else ()
    of_gpu = "needs a GPU" if device_kind() == "cpu" else ""
    quick = Part("quickstart", 75, (python, __file__, *small, "quickstart"),
                 "first step after 35 s (aim: 30), all after 75 s (aim: 60)",
                 environment=QUICKLY_COMPILED if v.small else {})  # fmt: skip
    checks = QUICKLY_COMPILED if v.small else UNTUNED
    several = [
        step("1.7B", "64 x 512", 70, prediction="gradient below 1.30 s (1.39 before), compiled within 45 s"),
        step("1.7B", "64 x 512, cache kernel", 40, "--decode_attention=fused", not_run=of_gpu,
             prediction="rollout below 1.3 s (1.63 before), if attention over the cache takes the time of its bytes"),
        step("1.7B", "64 x 512, auto", 40, "--remat=auto", "--micro_batch=0",
             prediction="dots in micro-batches of 64; gradient below 1.08 s (1.16 with dots of 16 before)"),
        Part("families", 50, (python, HERE / "families.py", *families), "float32 within 1e-4 of torch", beside=True,
             environment=checks),
        Part("resume", 50, (python, __file__, *small, "resume"), "killed and continued: the same export, byte for byte",
             beside=True, environment=checks),
        Part("tests", 50, (python, __file__, *small, "tests"), "all pass: kernels, int8, experts, host memory",
             beside=True, environment=checks),
        quick,
        step("1.7B", "64 x 512, int8", 40, "--adapter=16", "--teacher_dtype=int8",
             prediction="rollout 1.5 s if products convert the weights they read (22 % fewer bytes), else 2.2 s"),
        step("1.7B", "64 x 512, larger chunks", 30, "--logits_chunk=1024",
             prediction="gradient 0.04 s below that of 64 x 512"),
        replace(quick, name="quickstart, autotune=steps", command=(*quick.command, "compute.autotune=steps"),
                prediction="first step 10 s earlier than quickstart's"),
        replace(quick, name="quickstart, compile_ahead=off", command=(*quick.command, "compute.compile_ahead=off"),
                prediction="first step 15 s later than quickstart's"),
        step("1.7B", "256 x 512", 85, prediction="step 10.5 s, rollout 3.1 s: 50 % of the bandwidth"),
        step("0.6B", "64 x 512", 55, prediction="step 2 s, rollout 1.2 s, bound by the number of kernels"),
        step("135M", "64 x 512", 50, prediction="step 1.3 s, rollout 0.9 s"),
        *peers(),
        step("1.7B", "64 x 512, offload late", 35, "--offload=late",
             prediction="step 0.7 s longer, peak 13 GiB lower: moments and teacher over PCIe"),
        step("1.7B", "64 x 512, offload ahead", 35, "--offload=ahead", prediction="step 0.3 s longer"),
        step("0.6B", "64 x 2048", 90, prediction="step 11.5 s, rollout 8 s"),
        step("1.7B", "64 x 2048", 110, prediction="step 18 s, rollout 11 s"),
        step("1.7B", "64 x 512, dots 16", 40, "--micro_batch=16", "--remat=dots",
             prediction="gradient below 1.08 s (1.16 before)"),
        step("0.6B", "256 x 512", 75, prediction="step 6 s, rollout 2.6 s"),
        step("135M", "256 x 512", 55, prediction="step 2.2 s, rollout 1 s"),
        step("135M", "64 x 2048", 75, prediction="step 5.5 s, rollout 3.7 s"),
        step("1.7B", "64 x 512, float32", 130, "--dtype=float32", prediction="step 25 to 30 s, 8 times bfloat16"),
        step("135M", "256 x 2048", 90, prediction="step 12 s, rollout 6 s"),
        step("0.6B", "256 x 2048", 145, prediction="step 40 s, rollout 27 s"),
        step("1.7B", "256 x 2048", 190, prediction="step 58 s, rollout 29 s, peak 90 GiB: 60 of cache"),
    ]  # fmt: skip
    chosen = [part for part in several if not v.only or part.name.startswith(tuple(v.only))]
    if not chosen:
        raise app.UsageError(
            f"--only={','.join(v.only)} is no part; the parts are {'; '.join(p.name for p in several)}"
        )
    return chosen


def peers() -> list[Part]:
    """TRL and vLLM at the first part's sizes."""
    v = flags.FLAGS
    sizes = ("--shape", "tiny", "--batch", "4", "--prompt-len", "16", "--new-tokens", "16")
    if not v.small:
        sizes = ("--shape", "qwen3-1.7b", "--batch", "64", "--prompt-len", "128", "--new-tokens", "512")
    trl = ("--micro-batch", "2" if v.small else "16", "--checkpointing", "--dtype", "bfloat16", "--steps", "1")
    here, missing = v.peers_python or "", "" if v.peers_python else "no --peers_python"
    without = {name: missing or ("" if imports(here, name) else f"{name} is not installed") for name in ("trl", "vllm")}
    return [
        Part("TRL 1.7B", 60, (here, HERE / "peers/trl_distill.py", "--tokenizer", v.tokenizer, *sizes, *trl),
             "16 s a step, as before", not_run=without["trl"]),
        Part("vLLM 1.7B", 120, (here, HERE / "peers/vllm_sample.py", *sizes),
             "sampling alone: 42 to 50 % of the bandwidth in published runs", not_run=without["vllm"]),
    ]  # fmt: skip


def imports(python: str, module: str) -> bool:
    """Whether a Python has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------- the parts of a run


def train(workdir: Path, *options: str) -> subprocess.Popen[bytes]:
    """A quickstart, started; with --small, a few small steps without evaluations."""
    own = (f"--config={QUICKSTART}", f"--workdir={workdir}")
    if flags.FLAGS.small:
        options = (*SHORT, *options, "--config.rollout.batch_size=8", "--config.optimizer.micro_batch=4",
                   "--config.rollout.max_response_tokens=16")  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "camopd_jax.train", *own, *options], stdout=sys.stderr)


def quickstart(*fields: str) -> dict[str, Any]:
    """Seconds until the first step and the end of the quickstart, without compiled programs of an earlier start.

    Args:
      fields: changes of the config, as "compute.autotune=steps".
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        workdir, started = Path(folder) / "run", time.perf_counter()
        fields = (*fields, "steps=1") if flags.FLAGS.small else fields
        process = train(workdir, *(f"--config.{field}" for field in fields))
        while process.poll() is None and not (workdir / "metrics.jsonl").exists():
            time.sleep(0.1)
        first_step = time.perf_counter() - started
        if process.wait():
            raise RuntimeError(f"train ended with exit code {process.returncode}")
        return {"first_step": round(first_step, 1), "run": round(time.perf_counter() - started, 1)}


def resume() -> dict[str, Any]:
    """Whether a run that was killed after two steps ends with the export of one that was not; seconds of its second
    start, with all programs compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        through, killed = Path(folder) / "through", Path(folder) / "killed"
        if train(through, *SHORT).wait():
            raise RuntimeError("train failed")
        process = train(killed, *SHORT)
        while process.poll() is None and not any((killed / "checkpoints").glob("[0-9]*")):
            time.sleep(0.05)
        at = len(read_rows(killed / "metrics.jsonl"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        started = time.perf_counter()
        if train(killed, *SHORT).wait():
            raise RuntimeError("the killed run could not continue")
        second = round(time.perf_counter() - started, 1)
        same = [(one / "export/model.safetensors").read_bytes() for one in (through, killed)]
        return {"killed_after_step": at, "same_bytes": same[0] == same[1], "second_start": second}


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
    of_xla = " ".join(variables.get("XLA_FLAGS", "") for variables in (os.environ, part.environment)).strip()
    environment = os.environ | part.environment | {"XLA_FLAGS": of_xla}
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
    lines = [line for text in out.splitlines() if (line := _json(text)) is not None]
    if process.returncode and "error" not in result:
        result["error"] = " / ".join(errors.strip().splitlines()[-2:])[-300:] or f"exit code {process.returncode}"
    result |= lines[0] if len(lines) == 1 else {"lines": lines}
    return result | {"part_seconds": round(time.perf_counter() - started, 1), "prediction": part.prediction}


def _json(text: str) -> dict[str, Any] | None:
    """A line of JSON; None: another line, such as those that TRL prints in Python's form."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def run_all(several: Sequence[Part], ends: float) -> Iterator[dict[str, Any]]:
    """The result of each part, as soon as it is there; those that are `beside` their neighbours run at one time.

    Args:
      ends: the time of `time.perf_counter` at which all has to be done.
    """
    small = flags.FLAGS.small

    def result(part: Part) -> dict[str, Any]:
        left = ends - time.perf_counter()
        why = part.not_run or (OUT_OF_TIME if left < (5 if small else part.seconds) else "")
        if why:
            return {"part": part.name, "not_run": why, "prediction": part.prediction}
        return run(part, min(left, part.seconds * (10 if small else 2)))  # a CPU is slow

    for beside, group in itertools.groupby(several, key=lambda part: part.beside):
        members = list(group)
        with ThreadPoolExecutor(len(members) if beside else 1) as threads:
            for done in as_completed([threads.submit(result, part) for part in members]):
                yield done.result()


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
        known = f"{result['programs_in_cache']} of {result['programs']} programs in the cache"
        texts.append(
            f"first step {result['warm_up_seconds']:.0f} s ({known}), peak {result['peak_memory_gib']:.1f} GiB"
        )
    known = ("lines", "seconds", "part", "part_seconds", "prediction", "device", "error", "not_run")
    if not texts:
        texts += [f"{name} {value}" for name, value in result.items() if name not in known]
        texts += [f"not run: {result['not_run']}"] if "not_run" in result else []
    return "\n".join([*texts, *([f"ERROR: {result['error']}"] if "error" in result else [])])


def table(results: Iterable[dict[str, Any]], device: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=device)
    for column in ("part", "result", "prediction", "s"):
        out.add_column(column)
    for result in results:
        out.add_row(result["part"], summary(result), result.get("prediction", ""), str(result.get("part_seconds", "-")))
    return out


@functools.cache
def device_kind() -> str:
    """The name of the device, asked in a process that ends: one that stays would keep its memory."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:  # one of the parts, in its own process
        part: Callable[..., dict[str, Any]] = {"quickstart": quickstart, "resume": resume, "tests": tests}[arguments[1]]
        print(json.dumps(part(*arguments[2:])), flush=True)
        return
    v, name, results = flags.FLAGS, device_kind(), []
    ends = time.perf_counter() + v.seconds
    with tempfile.TemporaryDirectory() as cache:  # new, so that the first step's seconds are those of a first start
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for result in run_all(parts(), ends):
            results.append(result | {"device": name})
            status = result.get("error") or (f"not run: {result['not_run']}" if "not_run" in result else "done")
            print(f"{result['part']}: {status} ({result.get('part_seconds', 0)} s)", flush=True)
            if v.out:
                with Path(v.out).open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    Console(width=max(100, shutil.get_terminal_size().columns), highlight=False).print(table(results, name))


if __name__ == "__main__":
    app.run(main)
