"""A first config for two models and a file of prompts: sizes, mesh and benchmarks from the data and the memory."""

import contextlib
import dataclasses
import math
import runpy
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.identity import changed
from camopd_jax.config.methods import METHODS
from camopd_jax.config.schema import Adapter, Benchmark, RolloutConfig, Start, Stream, TrainConfig
from camopd_jax.data.pipeline import SELF
from camopd_jax.data.templates import Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.method.setup import check_start
from camopd_jax.models.peft_settings import base_folder, is_adapter
from camopd_jax.planning import config_text, search
from camopd_jax.planning.arrays import read_folders
from camopd_jax.planning.costs import weights
from camopd_jax.planning.doctor import GIB, Checked, Examination, Finding, examine, longest_sequence
from camopd_jax.planning.memory import device_memory
from camopd_jax.planning.search import Candidate
from camopd_jax.planning.survey import Survey, answer_pattern, survey
from camopd_jax.planning.topology import CHIPS, Topology
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.jsonl import atomic_file, write_rows

ROOM = 0.9  # of the memory: the estimate counts activations roughly, and no code
ROWS_PER_CHIP = 8  # of a micro-batch; by the arithmetic, more gain nothing
CLOSE = 1.05  # candidates are alike up to this multiple of the quickest one's seconds
BATCH, ANSWER = 64, 512  # prompts of a step; tokens of an answer, where the data say nothing
SELF_PROMPT = 512  # cap of prompts that the original model writes, in tokens
# Measured on the quickstart's models and on SmolLM2-135M (docs/results.md); the paper's, for 4B and 8B
LEARNING_RATES = {0.3e6: 2e-4, 135e6: 1e-5, 4e9: 2e-6}
ADAPTER_RATE = 10.0  # times the rate of full training
# Of devices whose speed is not known: its ratios of products, memory and links are like those of a data-centre GPU
ORDER_BY = CHIPS["v5p"]


@dataclass(frozen=True)
class Request:
    """What a new config is made of."""

    folder: Path  # to be written
    general: str
    specialised: str
    domain: str
    general_prompts: str | None  # None: the original model is to write them
    where: Topology


@dataclass(frozen=True)
class Draft:
    """A config, and where its values come from."""

    config: TrainConfig
    surveys: dict[str, Survey]  # by branch; of a branch without prompts yet there is none
    models: dict[str, Checked]
    where: Topology
    sizes: Candidate  # the chosen one
    hbm: float  # bytes of a device


@dataclass(frozen=True)
class Written:
    """A new folder: its files with what is in them, findings of its config, and the next commands."""

    files: dict[Path, str]
    findings: list[Finding]
    commands: list[str]


def write(request: Request) -> Written:
    """Writes the folder with its config and, where the data have answers, prompts and held-out questions.

    Raises:
      UserError: if the folder exists or cannot be written, for models and data that a run refuses, and if nothing fits
        in memory.
    """
    draft = make_draft(request)
    with _new_folder(request.folder) as part:
        files = _write_data(draft, part)
        text = config_text.render(draft, request.folder, next_commands(request))
        with atomic_file(part / "config.py") as file:
            file.write(text)
        config = from_config_dict(TrainConfig, runpy.run_path(str(part / "config.py"))["get_config"]())
        # With a chip's numbers, so that it does not measure this machine's speed
        findings, _ = examine(config, None, dataclasses.replace(request.where, chip=ORDER_BY))
        if wrong := next((one for one in findings if one.kind == "wrong"), None):
            raise UserError(f"{wrong.about}: {wrong.text}")
    about = {"config.py": "the config; its comments say where each value is from"} | files
    named = {request.folder / name: text for name, text in about.items()}
    return Written(named, [one for one in findings if one.kind == "odd"], next_commands(request))


def next_commands(request: Request) -> list[str]:
    """What to run after `init`, in this order."""
    config, workdir = request.folder / "config.py", Path("runs") / request.folder.name
    flags = f"--config={shlex.quote(str(config))} --workdir={shlex.quote(str(workdir))}"
    return [f"python -m camopd_jax.{name} {flags}" for name in ("doctor", "train")]


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is complete; it is removed if it is not."""
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write ({error.strerror}); give another name, or free disk space") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raises UserError unless the folder can be created."""
    if folder.suffix in (".py", ".yaml", ".yml"):
        raise UserError(f"{folder}: the name is that of a folder; give {folder.with_suffix('')}")
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already, and nothing in it was changed; give another name, or remove it")


# ------------------------------------------------------------------------------------------- choosing


def make_draft(request: Request) -> Draft:
    """Chooses every value of the config.

    Raises:
      UserError: as `write`.
    """
    check_folder(request.folder)
    names = {"recovery": request.general_prompts, "review": request.domain}
    config = TrainConfig(request.general, request.specialised)
    streams = {name: Stream(source or SELF) for name, source in names.items()}
    branches = {name: dataclasses.replace(of, prompts=streams[name]) for name, of in config.branches.items()}
    config = dataclasses.replace(config, branches=branches)
    models = _models(config)
    student = models["specialised"]
    flags, surveys = {"recovery": "--general_prompts", "review": "--domain"}, {}
    for name, source in names.items():
        if source is not None:
            tokenizers = Tokenizers(student.reader, models[config.branches[name].teacher].reader)
            surveys[name] = survey(source, flags[name], tokenizers)
    config = dataclasses.replace(config, rollout=_lengths(models, surveys, request))
    config = _recipe(config, models, surveys)
    config, sizes, hbm = _fit(config, models, request.where)
    return Draft(config, surveys, models, request.where, sizes, hbm)


def _models(config: TrainConfig) -> dict[str, Checked]:
    look = Examination(config)
    for name in ("general", "specialised"):
        look.model(name, name, f"--{name}")
    look.tokenizers("models")
    return look.models


def _lengths(models: dict[str, Checked], surveys: dict[str, Survey], request: Request) -> RolloutConfig:
    """Batch size, and the caps of prompts and answers."""
    known = [longest_sequence(base_folder(model.folder)) for model in models.values()]
    limit = min((n for n in known if n), default=None)
    prompt = max(bucket(one.prompt_length(), RolloutConfig.smallest_bucket) for one in surveys.values())
    prompt = prompt if request.general_prompts is not None else max(prompt, SELF_PROMPT)
    answers = [one.answer_length() or ANSWER for one in surveys.values()]
    answers += [ANSWER] if request.general_prompts is None else []
    answer = bucket(max(answers), RolloutConfig.smallest_bucket)
    if limit is not None:
        prompt = min(prompt, limit // 2)
        answer = min(answer, limit - prompt)
    fewest = min(len(one.rows) for one in surveys.values())
    batch = min(BATCH, 2 ** int(math.log2(fewest)))
    chips = len(request.where.devices)
    return RolloutConfig(
        batch_size=max(batch // chips, 1) * chips, max_prompt_tokens=prompt, max_response_tokens=answer
    )


def _recipe(config: TrainConfig, models: dict[str, Checked], surveys: dict[str, Survey]) -> TrainConfig:
    """Adds the recipe of configs/recover.py and the benchmarks."""
    recipe = changed(config, METHODS["recover"].changes)
    assert isinstance(recipe, TrainConfig)
    config = recipe
    shapes = {name: model.config for name, model in models.items()}
    try:
        check_start(config, shapes, models["specialised"].folder)
    except UserError:  # the architectures differ, or an adapter is trained
        config = dataclasses.replace(config, start=Start())
    benchmarks = tuple(_benchmark(name, one, config) for name, one in surveys.items() if one.questions)
    evaluation = dataclasses.replace(config.evaluation, benchmarks=benchmarks)
    checkpoints = dataclasses.replace(config.checkpoints, every=40)
    if len(benchmarks) == 2:
        evaluation = dataclasses.replace(evaluation, every=40, patience=4, questions=128)
        checkpoints = dataclasses.replace(checkpoints, export="best")
    optimizer = dataclasses.replace(config.optimizer, schedule="cosine", learning_rate=_rate(models["specialised"]))
    return dataclasses.replace(config, steps=400, optimizer=optimizer, evaluation=evaluation, checkpoints=checkpoints)


def _benchmark(branch: str, of: Survey, config: TrainConfig) -> Benchmark:
    name = config_text.AXES[branch]
    common: dict[str, Any] = {"name": name, "task": of.task, "axis": name, "covered": True}
    common["max_response_tokens"] = config.rollout.max_response_tokens
    return Benchmark(**common, answer=answer_pattern(of.questions) if of.task == "likelihood" else Benchmark.answer)


def _rate(student: Checked) -> float:
    """The learning rate of the nearest size for which there is evidence."""
    size = weights(dataclasses.replace(student.config, adapter=()))
    nearest = min(LEARNING_RATES, key=lambda n: abs(math.log(n / size)))
    return LEARNING_RATES[nearest] * (ADAPTER_RATE if is_adapter(student.folder) else 1)


def _fit(config: TrainConfig, models: dict[str, Checked], where: Topology) -> tuple[TrainConfig, Candidate, float]:
    """The config on a mesh and with sizes that fit: as it is, else with a new adapter, else on weights in int8."""
    hbm = where.hbm or device_memory()
    where = dataclasses.replace(where, chip=ORDER_BY, hbm=ROOM * hbm)
    folders = {name: model.folder for name, model in models.items()}
    variants = [config]
    if not is_adapter(folders["specialised"]):
        rate = ADAPTER_RATE * config.optimizer.learning_rate
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        variants.append(dataclasses.replace(config, adapter=Adapter(), start=Start(), optimizer=optimizer))
    int8 = dataclasses.replace(config.compute, teacher="int8")
    variants.append(dataclasses.replace(variants[-1], compute=int8))
    least = math.inf
    for variant in variants:
        answer = variant.rollout.max_response_tokens
        context = variant.rollout.max_prompt_tokens + answer
        ordered = search.candidates(variant, read_folders(variant, folders, context), where, answer)
        ordered = [one for one in ordered if one.changes["compute.offload"] == config.compute.offload]
        least = min(least, *(one.peak for one in ordered)) if ordered else least
        if fitting := [one for one in ordered if one.peak <= ROOM * hbm]:
            best = _best(fitting)
            return search.changed(variant, best.changes), best, hbm
    if least == math.inf:
        raise UserError(
            f"--chips={len(where.devices)}: no mesh of so many devices divides the models' heads; give another number"
        )
    raise UserError(
        f"the run needs about {least / GIB:.3g} GiB on each device, even with an adapter on weights in int8, of which "
        f"it may have {ROOM * hbm / GIB:.3g} ({ROOM:.0%} of {hbm / GIB:.3g}); give more devices (--chips), larger ones "
        "(--hbm_gib) or a smaller model"
    )


def _best(fitting: list[Candidate]) -> Candidate:
    """Of the quickest ones, that with up to `ROWS_PER_CHIP` rows of a micro-batch on a chip, then with the most answers
    in progress, then with the least memory.
    """
    quickest = min(one.seconds for one in fitting)
    close = [one for one in fitting if one.seconds <= CLOSE * quickest]

    def order(one: Candidate) -> tuple[float, ...]:
        rows = one.changes["optimizer.micro_batch"] / (one.changes["mesh.data"] * one.changes["mesh.fsdp"])
        return -min(rows, ROWS_PER_CHIP), -(one.changes["rollout.concurrency"] or math.inf), one.peak

    return min(close, key=order)


def _write_data(draft: Draft, part: Path) -> dict[str, str]:
    """Writes prompts and held-out questions of each file that has some; returns the names with what is in them."""
    files = {}
    for branch, one in draft.surveys.items():
        if one.questions:
            axis = config_text.AXES[branch]
            write_rows(str(part / config_text.prompts_file(branch)), one.rows)
            write_rows(str(part / config_text.questions_file(branch)), one.questions)
            files[config_text.prompts_file(branch)] = f"{len(one.rows)} prompts of {one.source}"
            text = f"{len(one.questions)} questions held out of them: benchmark {axis}, task {one.task}"
            files[config_text.questions_file(branch)] = text
    return files
