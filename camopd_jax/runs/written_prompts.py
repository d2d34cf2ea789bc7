"""Prompts that a run's teachers write before its first step: those of branches whose prompts have the source "self"."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from etils import epath

from camopd_jax.config.schema import Stream, Template, TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.pipeline import SELF
from camopd_jax.data.prompt_set import Manifest
from camopd_jax.data.templates import Reader
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.evals.questions import location
from camopd_jax.method.branches import Models, model_source
from camopd_jax.method.setup import Setup
from camopd_jax.models.checksums import sha256
from camopd_jax.runs import self_prompts
from camopd_jax.runs.self_prompts import FILE, SelfPrompting
from camopd_jax.runs.workdir import check_owner, write_errors
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import broadcast, is_primary, run_on_all
from camopd_jax.runtime.paths import in_home
from camopd_jax.runtime.progress import work

MANIFEST = "manifest.json"
FOLDER = "self_prompts"  # in the work directory; a folder for each branch


def write_missing(setups: Sequence[Setup], models: Models, config: TrainConfig, workdir: str) -> list[Setup]:
    """The setups of a run, with files of the work directory in place of "self". Those that are missing are written.

    Args:
      setups: of the parts of the run.

    Raises:
      UserError: if the work directory belongs to another run, if the files there were written with other settings or
        have changed, and if no text of a teacher is a prompt.
    """
    names = [name for name, branch in config.branches.items() if branch.prompts.source == SELF]
    if names:
        run_on_all(lambda: _check(workdir, config))
    for name in names:
        _write(setups[-1], models, name, folder(workdir, name))
    return [replace(setup, config=with_files(setup.config, workdir)) for setup in setups]


def folder(workdir: str, branch: str) -> Path:
    return in_home(workdir) / FOLDER / branch


def with_files(config: TrainConfig, workdir: str) -> TrainConfig:
    """The config with the files that a run in this work directory reads in place of "self"."""
    branches = {
        name: replace(branch, prompts=replace(branch.prompts, source=str(folder(workdir, name) / FILE)))
        for name, branch in config.branches.items()
        if branch.prompts.source == SELF
    }
    return replace(config, branches=config.branches | branches)


def _check(workdir: str, config: TrainConfig) -> None:
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir}: prompts with the source {SELF!r} are written to a folder of a file system; write "
            "them with `python -m camopd_jax.prompts self` and name the file"
        )
    check_owner(epath.Path(workdir), config)


def settings_of(config: TrainConfig, branch: str, longest: int) -> SelfPrompting:
    """The settings of a branch's prompts."""
    of, writing = config.branches[branch], config.branches[branch].prompts.writing
    return SelfPrompting(
        model=model_source(config, of.teacher),
        rows=writing.rows,
        longest=longest,
        shortest=writing.shortest,
        sampling=writing.sampling,
        system=_template(of.prompts).system,
        batch_size=config.rollout.batch_size,
        seed=config.seed,
        scripts=writing.scripts,
        clusters=writing.clusters,
    )


def _template(stream: Stream) -> Template:
    """The template by which the writing model reads the prompts."""
    return stream.teacher_template or stream.template


def _write(setup: Setup, models: Models, branch: str, out: Path) -> None:
    config, writer = setup.config, models.teacher(setup.config.branches[branch].teacher)
    settings = settings_of(config, branch, longest_text(config, branch, writer.reader))
    if broadcast((out / MANIFEST).exists):
        run_on_all(lambda: _check_written(out, settings))
        return
    display = Display(0, 0)
    evaluation, texts = config.evaluation, out / "texts"
    questions = [location(of, tasks.find(of, evaluation.judge)) for of in evaluation.benchmarks]
    with write_errors(epath.Path(out)), work(f"{settings.model} writes {settings.rows} prompts of {branch}"):
        manifest = self_prompts.write(writer, settings, questions, out, keep=epath.Path(texts))
    if is_primary():
        shutil.rmtree(texts, ignore_errors=True)
    (part,) = manifest["parts"]
    display.print(f"{settings.model} wrote {part['kept']} prompts of {branch} in {part['read']} texts: {out / FILE}")


def longest_text(config: TrainConfig, branch: str, reader: Reader) -> int:
    """The tokens that a prompt's text may have beside its template.

    Raises:
      UserError: if the template alone has as many tokens as a prompt may have.
    """
    row = {"messages": [{"role": "user", "content": self_prompts.MARK}]}
    template = _template(config.branches[branch].prompts)
    text = templates.tokens(reader.tokenizer, self_prompts.MARK)
    around = len(reader.prompt(row, template, branch)) - len(text)
    cap = config.rollout.max_prompt_tokens
    if around >= cap:
        raise UserError(
            f"config.rollout.max_prompt_tokens = {cap} leaves no room for a text beside the {around} tokens of the "
            "template; raise it"
        )
    return cap - around


def _check_written(out: Path, settings: SelfPrompting) -> None:
    """Raises UserError unless the folder has the files that these settings wrote."""
    try:
        manifest: Manifest = json.loads((out / MANIFEST).read_text())
        (part,), digest = manifest["parts"], manifest["files"][FILE]
        written = {name: manifest.get(name) for name in ("seed", "sampling", "system", "scripts", "clusters")}
        written |= {"model": part["source"], "rows": part["asked"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / MANIFEST}: not the manifest of a set of prompts; remove {out}") from error
    wanted = {name: self_prompts.facts(settings).get(name) for name in written}
    wanted |= {"model": settings.model, "rows": settings.rows}
    if other := [name for name, value in wanted.items() if written[name] != value]:
        raise UserError(f"{out}: written with another {', '.join(other)}; remove it, or give a new --workdir")
    if not (out / FILE).exists() or sha256(out / FILE) != digest:
        raise UserError(f"{out / FILE}: missing, or changed since it was written; remove {out} to write it again")
