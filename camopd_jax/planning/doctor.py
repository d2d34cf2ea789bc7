"""Checks a config against its models, its prompts and the machine: all problems, and unusual settings."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath
from rich.table import Table

from camopd_jax.config.consistency import warnings
from camopd_jax.config.schema import Benchmark, Stream, Template, TrainConfig
from camopd_jax.data import answers, sources, templates
from camopd_jax.data.pipeline import SELF, PromptStream
from camopd_jax.data.questions import question_keys
from camopd_jax.data.templates import Reader, Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.evals.questions import prompts, read_questions
from camopd_jax.inference import loading
from camopd_jax.method import schedule
from camopd_jax.method.branches import find_model, teacher_names
from camopd_jax.method.optimizer import moment_names
from camopd_jax.method.setup import Setup, check_model, check_start, resolve
from camopd_jax.models import hf
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.config_json import text_config
from camopd_jax.models.peft_settings import base_folder
from camopd_jax.planning.arrays import ModelShapes, read_folders
from camopd_jax.planning.automatic import Values, choose, possible, stored_values
from camopd_jax.planning.costs import weights
from camopd_jax.planning.memory import check_memory, device_memory
from camopd_jax.planning.speed import duration, measured_chip, run_seconds
from camopd_jax.planning.topology import Chip, Topology
from camopd_jax.runs.self_prompts import FILE, open_turn
from camopd_jax.runs.workdir import check_owner
from camopd_jax.runs.written_prompts import folder, longest_text, settings_of, with_files

GIB = 2**30
MARKS = {"good": "[green]ok[/]", "odd": "[yellow]odd[/]", "wrong": "[red]wrong[/]"}


@dataclass(frozen=True)
class Finding:
    about: str
    kind: Literal["good", "odd", "wrong"]  # wrong: it would stop the run
    text: str


@dataclass(frozen=True)
class Checked:
    """A checkpoint that a run could load."""

    folder: Path
    config: ModelConfig
    tokenizer: Any

    @property
    def reader(self) -> Reader:
        return Reader(self.tokenizer, self.config.vocab_size)


def examine(config: TrainConfig, workdir: str | None, where: Topology) -> tuple[list[Finding], dict[str, str]]:
    """All findings, and a prompt of each branch as the student reads it."""
    look, names = Examination(config), teacher_names(config)
    for name, field in names.items():
        own = name in ("general", "specialised")
        look.at(f"{name} model" if own else f"teacher of {field.split('.')[2]}", look.model, name, field)
    for benchmark in config.evaluation.benchmarks:
        look.at(f"benchmark {benchmark.name}", look.benchmark, benchmark)
    look.at("benchmarks", look.axes)
    complete = len(look.models) == len(names)
    if complete:
        look.at("models", look.tokenizers)
        look.at("start", look.start)
        for branch in config.branches:
            look.at(f"{branch} prompts", look.prompts, branch, workdir)
    look.findings += [Finding("config", "odd", text) for text in warnings(config)]
    look.at("devices", look.devices, where, complete, stored_values(workdir))
    if workdir and complete:
        look.at("workdir", look.workdir, workdir)
    return look.findings, look.examples


class Examination:
    """Findings about a config. Every check gets the subject of its findings."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.findings: list[Finding] = []
        self.models: dict[str, Checked] = {}  # by what branches call them
        self.questions: dict[str, list[set[str]]] = {}  # of each benchmark: what tells each from others
        self.examples: dict[str, str] = {}  # a prompt of each branch

    def at(self, about: str, check: Callable[..., None], *args: Any) -> None:
        """Runs a check; a user's mistake that it raises is a finding."""
        try:
            check(about, *args)
        except UserError as error:
            self.findings.append(Finding(about, "wrong", str(error)))

    def good(self, about: str, text: str) -> None:
        self.findings.append(Finding(about, "good", text))

    def odd(self, about: str, text: str) -> None:
        self.findings.append(Finding(about, "odd", text))

    # -------------------------------------------------------------------------------- the models

    def model(self, about: str, name: str, field: str) -> None:
        folder = find_model(self.config, name, field)
        context = self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens
        model, base = loading.model_config(folder, context), base_folder(folder)
        values, kinds = hf.read_config(base), sorted(loading.stored_dtypes(folder))
        if name == "specialised":
            loading.check_adapter(self.config.adapter, folder, field)
        checked = self.models[name] = Checked(folder, model, templates.load_tokenizer(folder))
        self.good(about, f"{values['model_type']}, {weights(model) / 1e6:,.1f} M parameters in {', '.join(kinds)}")
        for warning in filter(None, (hf.stale_index(base), templates.class_warning(folder, checked.tokenizer))):
            self.odd(about, warning)
        positions = longest_sequence(base)
        if positions and context > positions:
            self.odd(
                about,
                f"{base / 'config.json'}: max_position_embeddings is {positions}, but prompt and answer may have "
                f"{context} tokens; lower config.rollout.max_response_tokens",
            )
        beyond = {i: t for t, i in checked.tokenizer.get_vocab().items() if i >= model.vocab_size}
        if beyond:
            self.odd(
                about,
                f"{folder}: the tokenizer has {len(beyond)} tokens beyond the embedding's {model.vocab_size} rows, the "
                f"first is {beyond[min(beyond)]!r}: a row with one of them stops a run",
            )

    def tokenizers(self, about: str) -> None:
        student, branches = self.models["specialised"], self.config.branches.values()
        others = [model.folder for name, model in self.models.items() if name != "specialised"]
        shared = templates.shared_vocabulary(student.folder, others)
        self.good(about, f"one tokenizer of {shared.size or len(student.tokenizer)} tokens")
        for warning in shared.warnings:
            self.odd(about, warning)
        if of_pair := loading.pair_warning(self.models["general"].folder, student.folder):
            self.odd(about, of_pair)
        for warning in dict.fromkeys(text for of in branches for text in self._template_warnings(of.prompts.template)):
            self.odd(about, warning)

    def start(self, about: str) -> None:
        shapes = {name: model.config for name, model in self.models.items()}
        check_start(self.config, shapes, self.models["specialised"].folder)
        if weight := self.config.start.interpolation:
            self.good(about, f"{weight if weight == 'auto' else f'{weight:g}'} of the original model")

    def _template_warnings(self, template: Template) -> list[str]:
        student = self.models["specialised"]
        try:
            of_end = answers.eos_warning(student.folder, student.tokenizer, template)
            return [text for text in (of_end, answers.prompt_warning(student.tokenizer, template)) if text]
        except UserError:  # no usable template; a run only needs one if its rows have messages
            return []

    # ------------------------------------------------------------------- prompts and benchmarks

    def prompts(self, about: str, branch: str, workdir: str | None) -> None:
        """Reads a branch's prompts as a run does."""
        of = self.config.branches[branch]
        if of.prompts.source == SELF and not (workdir and (folder(workdir, branch) / FILE).exists()):
            return self._writing(about, branch, of.teacher)
        config = self.config if workdir is None else with_files(self.config, workdir)
        name, of = f"config.branches.{branch}.prompts", config.branches[branch]
        student = self.models["specialised"].tokenizer
        tokenizers = Tokenizers(self.models["specialised"].reader, self.models[of.teacher].reader)
        several = config.rollout.answers_per_prompt
        rows = schedule.batch_rows(config)[branch] // several
        prompts = PromptStream(of.prompts, config.rollout, tokenizers, config.seed, range(rows * several), name)
        kept, dropped, truncated = (prompts.counts[count] for count in ("kept", "dropped", "truncated"))
        first = schedule.first_step(config)
        acts = sum(branch in schedule.active_branches(config, step) for step in range(first, config.steps))
        low, middle, high = (int(np.quantile(prompts.lengths, q)) for q in (0, 0.5, 1))
        steps = f"{acts} steps of {rows} use each {acts * rows / kept:.3g} times"
        self.good(about, f"{kept} prompts of {low} to {high} tokens, median {middle}; {steps}")
        cap = f"config.rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}"
        if dropped > kept:
            self.odd(about, f"{dropped} of {dropped + kept} are longer than {cap} and are dropped; raise it")
        if truncated:
            self.odd(about, f"{truncated} of {kept} are longer than {cap} and lose their start")
        if kept < rows:
            self.odd(about, f"{kept} are fewer than the {rows} of a step: a step uses some of them twice")
        self._leaks(about, of.prompts, name)
        batch = next(prompts).student
        self.examples[branch] = student.decode(batch.tokens[0, : batch.lengths[0]])

    def _writing(self, about: str, branch: str, teacher: str) -> None:
        """Prompts that the run will write."""
        writer = self.models[teacher]
        longest = longest_text(self.config, branch, writer.reader)
        settings = settings_of(self.config, branch, longest)
        open_turn(writer.tokenizer, settings.system)
        text = f"{settings.model} writes {settings.rows} prompts of at most {longest} tokens before the first step"
        self.good(about, text)

    def _leaks(self, about: str, stream: Stream, name: str) -> None:
        """Questions of benchmarks that are among the prompts."""
        if not any(self.questions.values()):
            return
        rows = sources.read(stream.source, stream.split, stream.limit, f"{name}.source")
        known = set().union(*map(_keys, rows))
        for benchmark, questions in self.questions.items():
            if both := sum(not known.isdisjoint(question) for question in questions):
                self.odd(
                    about,
                    f"{both} of the {len(questions)} questions of benchmark {benchmark} are among these prompts; "
                    "`python -m camopd_jax.data.recipe jsonl --against` removes them",
                )

    def benchmark(self, about: str, benchmark: Benchmark) -> None:
        task = tasks.find(benchmark, self.config.evaluation.judge)
        task.check()
        rows = read_questions(benchmark, task)
        for model in (self.models[name] for name in ("general", "specialised") if name in self.models):
            prompts(benchmark, task, model.reader, rows)
        self.good(about, f"{len(rows)} questions on the {benchmark.axis} axis")
        if line := task.notice():
            self.good(about, line)
        self.questions[benchmark.name] = [_keys(row) for row, _ in rows]

    def axes(self, about: str) -> None:
        measured = {benchmark.axis for benchmark in self.config.evaluation.benchmarks}
        for axis, outcome in {"general": "came back", "domain": "was kept"}.items():
            if axis not in measured:
                none = f"config.evaluation.benchmarks has none on the {axis} axis"
                self.odd(about, f"{none}: the run will not measure how much {outcome}")

    # ------------------------------------------------------------------- the machine, the folder

    def devices(self, about: str, where: Topology, complete: bool, before: Values) -> None:
        limit = where.hbm or device_memory()
        shapes = {name: model.config for name, model in self.models.items()}
        config = possible(self.config, where.devices)
        if complete:
            models = self._shapes
            choice = choose(self.config, models, where.devices, limit, before)
            config = choice.config
        *_, setup = (resolve(part, where.devices) for part in schedule.parts(config))
        for shape in shapes.values():
            check_model(shape, setup.mesh, config.compute, setup.dtype)
        sizes = " x ".join(f"{axis} {n}" for axis, n in setup.mesh.shape.items())
        devices = f"{len(where.devices)} of {where.platform}, {sizes}"
        self.good(about, f"{devices}; all batch sizes and models divide evenly")
        if not complete:
            return
        least = check_memory(setup, models, limit)
        text = f"parameters, gradient, Adam's moments and teachers take {least / GIB:.2f} of {limit / GIB:.2f} GiB"
        shared = ", ".join(sorted(models.on_one_base))
        once = f"; one set of frozen weights serves {shared} and student" if shared else ""
        self.good(about, f"{text} per device, before caches and activations{once}")
        if choice.values:
            self.good(about, f"auto: {choice}")
        self._time(setup, models, where.chip or measured_chip(setup.dtype, where.platform))

    def _time(self, setup: Setup, models: ModelShapes, chip: Chip) -> None:
        seconds = run_seconds(setup, models, chip, {name: len(rows) for name, rows in self.questions.items()})
        parts = ", ".join(f"{name} {duration(each)}" for name, each in seconds.items() if each)
        speed = f"{chip.flops / 1e9:,.0f} GFLOP/s and {chip.hbm_bandwidth / 1e9:,.0f} GB/s"
        total = duration(sum(seconds.values()))
        self.good(
            "time",
            f"about {total} ({parts}) at {speed} per device, for prompts and answers of full length; loading and "
            "compiling come on top",
        )

    @cached_property
    def _shapes(self) -> ModelShapes:
        """Of all models, which must have been checked."""
        context = self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens
        return read_folders(self.config, {name: model.folder for name, model in self.models.items()}, context)

    def workdir(self, about: str, workdir: str) -> None:
        config, student = self.config, self._shapes.student
        goes_on = check_owner(epath.Path(workdir), config)
        text = f"{workdir}: " + ("a run of this config, which will continue" if goes_on else "new")
        if "://" not in workdir:
            kept = config.checkpoints.keep_last + 1 + (config.checkpoints.keep_best if config.evaluation.every else 0)
            arrays = 1 + 2 * len(moment_names(config)) + (config.optimizer.average is not None)
            trained = weights(student, config.optimizer.trained)
            exported = trained if student.adapter else weights(student)
            needs, folder = 4 * (arrays * trained * kept + exported), Path(workdir).absolute()
            free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
            text += f"; {needs / GIB:.1f} GiB for {kept} checkpoints and the export, {free / GIB:.1f} GiB are free"
            if needs > free and not goes_on:
                raise UserError(f"{text}; lower config.checkpoints.keep_last or give another --workdir")
        self.good(about, text)


def longest_sequence(base: Path) -> int | None:
    """Tokens for which a model was made, by the config.json of its folder; None: it does not say."""
    return text_config(hf.read_config(base))[0].get("max_position_embeddings")


def _keys(row: dict[str, Any]) -> set[str]:
    """What tells a question from others; nothing, where a row has no text."""
    return question_keys(row) - {""}


def table(findings: list[Finding]) -> Table:
    view = Table.grid(padding=(0, 2))
    for one in findings:
        view.add_row(MARKS[one.kind], one.about, " ".join(one.text.split()).replace("[", r"\["))
    return view
