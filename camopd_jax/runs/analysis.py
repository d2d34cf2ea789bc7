"""Analyses one student: gradients of its branches, and correlations of the selection."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from camopd_jax.analysis import selection
from camopd_jax.analysis.diagnosis import Diagnosis
from camopd_jax.config.schema import TrainConfig
from camopd_jax.data import sources
from camopd_jax.errors import UserError
from camopd_jax.method.branches import load_models, make_branches, make_teachers
from camopd_jax.method.optimizer import init_state
from camopd_jax.method.programs import student_programs
from camopd_jax.method.setup import check_diagnostics, resolve
from camopd_jax.models import partition
from camopd_jax.runs import evaluation
from camopd_jax.runs.written_prompts import with_files
from camopd_jax.runtime.jsonl import read_rows


def analyze(config: TrainConfig, checkpoint: str | None, source_field: str) -> dict[str, Any]:
    """The figures of one student: a row as in diagnostics.jsonl, with the statistics of all steps under "training"."""
    setup = resolve(config)
    check_diagnostics(config, setup.mesh)
    models = load_models(setup)
    student, evaluated = models.student, None
    if checkpoint:
        evaluated = evaluation.load_model(config, checkpoint, setup.mesh)
        if jax.tree.map(jnp.shape, evaluated.loaded.params) != jax.tree.map(jnp.shape, student.params):
            raise UserError(
                f"--checkpoint={checkpoint}: its parameters do not have the shapes of config.specialised_model = "
                f"{config.specialised_model}; give a student of this config"
            )
        if evaluated.run:
            config = with_files(config, str(evaluated.run))
            setup = replace(setup, config=config)
        student = student.with_params(jax.device_put(evaluated.loaded.params, jax.tree.map(_sharding, student.params)))
    state = init_state(partition.trained(student.params, config.optimizer.trained), moments=())
    teachers = make_teachers(config, models)
    branches = make_branches(setup, models, teachers, setup.rows, config.seed)
    programs = student_programs(setup, student, state, branches)
    row, answers = Diagnosis(setup, models, teachers, programs)(evaluated.step if evaluated else 0, state)
    of_prompts = {branch: prompt_sources(config, branch, source_field) for branch in config.branches}
    row["correlations"] = {branch: selection.correlations(answers[branch], of_prompts[branch]) for branch in answers}
    if evaluated and evaluated.run and (rows := read_rows(evaluated.run / "selection.jsonl")):
        row["training"] = {branch: of_training(rows, branch, of_prompts[branch]) for branch in config.branches}
    return row


def of_training(rows: list[dict[str, Any]], branch: str, of_prompts: list[str] | None) -> dict[str, Any]:
    """Statistics of the selection over all steps of a run, from its selection.jsonl."""
    steps = [row for row in rows if row["phase"] == branch]
    figures = {
        "steps": len(steps),
        "correlations": selection.over_steps(steps, of_prompts),
        "lengths": selection.lengths(steps),
        "repeats": selection.repeats(steps),
    }
    return figures if of_prompts is None else figures | {"by_source": selection.rates_by_source(steps, of_prompts)}


def prompt_sources(config: TrainConfig, branch: str, field: str) -> list[str] | None:
    """The value of `field` for each prompt of a branch; None if a row has none, or if all values are equal."""
    stream = config.branches[branch].prompts
    rows = sources.read(stream.source, stream.split, stream.limit, f"config.branches.{branch}.prompts.source")
    named = [str(row.get(field, "")) for row in rows]
    return named if all(named) and len(set(named)) > 1 else None


def _sharding(array: jax.Array) -> Sharding:
    return array.sharding
