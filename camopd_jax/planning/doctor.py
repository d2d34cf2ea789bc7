"""Checks a config against its models, its prompts and the machine: all problems, and what is odd but would run."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from etils import epath
from rich.table import Table

from camopd_jax.config.schema import Benchmark, Template, TrainConfig
from camopd_jax.data import sources, templates
from camopd_jax.data.pipeline import PromptStream
from camopd_jax.data.questions import question_keys
from camopd_jax.data.templates import Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.evals.questions import read_questions
from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.method.branches import STREAMS
from camopd_jax.models import hf
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.weights import shardings
from camopd_jax.planning.costs import Sizes, adam_bytes, memory_estimate, weights
from camopd_jax.planning.topology import Topology
from camopd_jax.runs.workdir import check_owner
from camopd_jax.runtime.mesh import mesh_of

GIB = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    about: str
    kind: Literal["good", "odd", "wrong"]  # wrong: it would end the run
    text: str


@dataclass
class Findings:
    """What was found, in order."""

    all: list[Finding] = field(default_factory=list)

    def good(self, about: str, text: str) -> None:
        self.all.append(Finding(about, "good", text))

    def odd(self, about: str, text: str) -> None:
        self.all.append(Finding(about, "odd", text))

    def look(self, about: str, act: Callable[..., T], *args: Any) -> T | None:
        """`act(self, *args)`; a user's mistake is found, and None comes back."""
        try:
            return act(self, *args)
        except UserError as error:
            self.all.append(Finding(about, "wrong", str(error)))
            return None

    @property
    def wrong(self) -> int:
        return sum(found.kind == "wrong" for found in self.all)


@dataclass(frozen=True)
class Checked:
    """A checkpoint that a run could load."""

    folder: Path
    config: ModelConfig
    tokenizer: Any


def examine(config: TrainConfig, workdir: str | None, where: Topology) -> tuple[Findings, dict[str, str]]:
    """All findings, and a prompt of each stream as the student reads it."""
    found = Findings()
    sides = ("general", "specialised")
    models = {side: found.look(f"{side} model", _model, config, side) for side in sides}
    complete = all(models.values())
    asked: dict[str, list[set[str]]] = {}
    read: dict[str, str] = {}
    for benchmark in config.evaluation.benchmarks:
        asked |= found.look(f"benchmark {benchmark.name}", _benchmark, config, benchmark) or {}
    _axes(found, config)
    if complete:
        found.look("models", _pair, *models.values())
        _end(found, models["specialised"], config.domain.template)
        for branch, stream in STREAMS.items():
            read |= found.look(f"{stream} prompts", _prompts, config, branch, models, asked) or {}
    found.look("devices", _devices, config, where, models)
    if workdir and complete:
        found.look("workdir", _workdir, config, workdir, models["specialised"].config)
    return found, read


# ------------------------------------------------------------------------------------ the models


def _model(found: Findings, config: TrainConfig, side: str) -> Checked:
    folder = loading.find(getattr(config, f"{side}_model"), f"config.{side}_model")
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    model = loading.model_config(folder, context)
    kinds = sorted({str(tensor.dtype) for tensor in hf.matching(folder, model).values()})
    tokenizer = templates.load_tokenizer(folder)
    raw = hf.read_config(folder)
    found.good(f"{side} model", f"{raw['model_type']}, {weights(model) / 1e6:,.1f} M parameters in {', '.join(kinds)}")
    trained = raw.get("max_position_embeddings")
    if trained and context > trained:
        found.odd(
            f"{side} model",
            f"{folder / 'config.json'} tells of {trained} positions, and prompt and answer may have {context}; lower "
            "config.rollout.max_response_tokens",
        )
    return Checked(folder, model, tokenizer)


def _pair(found: Findings, general: Checked, specialised: Checked) -> None:
    warning = templates.check_same_tokenizer(specialised.folder, general.folder)
    found.good("models", f"one tokenizer of {len(general.tokenizer)} tokens")
    if warning:
        found.odd("models", warning)
    if hf.fingerprint(general.folder) == hf.fingerprint(specialised.folder):
        found.odd(
            "models",
            "config.general_model and config.specialised_model hold the same weights: there is nothing to bring back",
        )


def _end(found: Findings, student: Checked, template: Template) -> None:
    """Whether what the chat template writes behind an answer ends one."""
    row = {"messages": [{"role": "user", "content": "hi"}]}
    try:
        last = templates.answer_ids(student.tokenizer, row, "yes", template)[1][-1]
    except UserError:  # no template, or one that tells nothing of this: nor does a run ask for it
        return
    ends = templates.eos_ids(student.folder, student.tokenizer)
    if last not in ends:
        name = student.tokenizer.convert_ids_to_tokens
        found.odd(
            "models",
            f"the chat template ends an answer with {name(last)!r}, which is none of {name(list(ends))} that end one: "
            f"answers run to their cap; name it as eos_token_id in {student.folder / 'generation_config.json'}",
        )


# ----------------------------------------------------------------------------------- the prompts


def _prompts(
    found: Findings, config: TrainConfig, branch: str, models: dict[str, Checked], asked: dict[str, list[set[str]]]
) -> dict[str, str]:
    """Reads a branch's stream as a run does: {its name: a prompt as the student reads it}."""
    name = STREAMS[branch]
    about, stream = f"{name} prompts", getattr(config, name)
    teacher = models["general" if branch == "recovery" else config.method.domain_teacher]
    student = models["specialised"].tokenizer
    rows = loop.batch_rows(config)[branch]
    prompts = PromptStream(
        stream, config.rollout, Tokenizers(student, teacher.tokenizer), config.seed, range(rows), f"config.{name}"
    )
    kept, dropped, truncated = (prompts.counts[count] for count in ("kept", "dropped", "truncated"))
    cap = f"config.rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}"
    acts = sum(branch in loop.ACTING[loop.phase_at(step, config.method)] for step in range(config.steps))
    low, middle, high = (int(np.quantile(prompts.lengths, q)) for q in (0, 0.5, 1))
    found.good(
        about,
        f"{kept} of {low} to {high} tokens, half of them up to {middle}; {acts} steps of {rows} ask each "
        f"{acts * rows / kept:.3g} times",
    )
    if dropped > kept:
        found.odd(about, f"{dropped} of {dropped + kept} are longer than {cap} and dropped; raise it")
    if truncated:
        found.odd(about, f"{truncated} of {kept} are longer than {cap} and lose their front")
    if kept < rows:
        found.odd(about, f"{kept} are fewer than the {rows} of a step, which asks some of them twice")
    if asked:
        source = sources.read(stream.source, stream.split, stream.limit, f"config.{name}.source")
        known = set().union(*map(_telling, source))
        for benchmark, questions in asked.items():
            if both := sum(not known.isdisjoint(question) for question in questions):
                found.odd(
                    about,
                    f"{both} of the {len(questions)} questions of benchmark {benchmark} are among them; `python -m "
                    "camopd_jax.data.recipe jsonl --against` leaves them out",
                )
    batch = next(prompts).student
    return {name: student.decode(batch.tokens[0, : batch.lengths[0]])}


def _telling(row: dict[str, Any]) -> set[str]:
    """What tells a question from others; nothing, where a row has no text."""
    return question_keys(row) - {""}


# --------------------------------------------------------------------- benchmarks, machine, folder


def _benchmark(found: Findings, config: TrainConfig, benchmark: Benchmark) -> dict[str, list[set[str]]]:
    """{its name: what tells each of its questions}"""
    task = tasks.find(benchmark, config.evaluation.judge)
    task.check()
    rows = read_questions(benchmark, task)
    found.good(f"benchmark {benchmark.name}", f"{len(rows)} questions of the {benchmark.axis} axis")
    return {benchmark.name: list(map(_telling, rows))}


def _axes(found: Findings, config: TrainConfig) -> None:
    unseen = {"general": "came back", "domain": "was kept"}
    named = {benchmark.axis for benchmark in config.evaluation.benchmarks}
    for axis, outcome in unseen.items():
        if axis not in named:
            found.odd(
                "benchmarks",
                f"none in config.evaluation.benchmarks of the {axis} axis: the run will not say how much {outcome}",
            )


def _devices(found: Findings, config: TrainConfig, where: Topology, models: dict[str, Checked | None]) -> None:
    mesh = mesh_of(config.mesh, where.devices)
    loop.check_batches(config, mesh)
    loop.check_remat(config, loading.matmul_dtype(config.compute, where.platform))
    there = {side: model.config for side, model in models.items() if model}
    for model in there.values():
        shardings(model, mesh)
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    found.good("devices", f"{len(where.devices)} of {where.platform}, {sizes}; every batch and every model divides")
    if len(there) < len(models):
        return
    least = _least(config, where.platform, mesh.shape, **there)
    text = f"parameters, gradient, Adam's moments and teachers take {least / GIB:.2f} GiB of each"
    if where.hbm and least > where.hbm:
        mend = " or config.compute.offload=late" if config.compute.offload == "off" else ""
        raise UserError(f"{text}, which has {where.hbm / GIB:.2f}; give more of them{mend}")
    found.good("devices", f"{text}, before caches and activations")


def _least(config: TrainConfig, platform: str, mesh: Sizes, general: ModelConfig, specialised: ModelConfig) -> float:
    """Bytes of a device that an update needs, and a gradient without its activations."""
    found = memory_estimate(config, general, specialised, mesh, platform)
    return found["resident"] + found["update"]


def _workdir(found: Findings, config: TrainConfig, workdir: str, model: ModelConfig) -> None:
    goes_on = check_owner(epath.Path(workdir), config)
    text = f"{workdir}: " + ("a run of this config, which goes on" if goes_on else "new")
    if "://" in workdir:
        found.good("workdir", text)
        return
    kept = config.checkpoints.keep_last + 1 + (config.checkpoints.keep_best if config.evaluation.every else 0)
    needs = (weights(model) * 4 + adam_bytes(config, model)) * kept + weights(model) * 4
    there = next(p for p in (Path(workdir).absolute(), *Path(workdir).absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    text += f"; {needs / GIB:.1f} GiB for {kept} checkpoints and the export, {free / GIB:.1f} are free"
    if needs > free and not goes_on:
        raise UserError(f"{text}; lower config.checkpoints.keep_last or give another --workdir")
    found.good("workdir", text)


# ------------------------------------------------------------------------------------- the command

MARKS = {"good": "[green]ok[/]", "odd": "[yellow]odd[/]", "wrong": "[red]wrong[/]"}


def table(found: Findings) -> Table:
    view = Table.grid(padding=(0, 2))
    for one in found.all:
        view.add_row(MARKS[one.kind], one.about, " ".join(one.text.split()).replace("[", r"\["))
    return view
