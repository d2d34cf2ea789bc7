"""The figures of one student: gradients of its branches, and what its selection follows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from camopd_jax.analysis import selection
from camopd_jax.analysis.diagnosis import Diagnosis
from camopd_jax.config.schema import TrainConfig
from camopd_jax.data import sources
from camopd_jax.errors import UserError
from camopd_jax.method import loop
from camopd_jax.method.branches import STREAMS, load_models
from camopd_jax.method.optimizer import abstract_state
from camopd_jax.runs import evaluation
from camopd_jax.runtime.jsonl import read_rows
from camopd_jax.runtime.mesh import check_rows, mesh_of


def analyze(config: TrainConfig, checkpoint: str | None, source_field: str) -> dict[str, Any]:
    """The figures of one student: a row as of diagnostics.jsonl, and under "training" those of the run's every step."""
    mesh = mesh_of(config.mesh)
    check_rows(mesh, "config.diagnostics.rows", config.diagnostics.rows)
    models = load_models(config, mesh)
    student, found = models.student, None
    if checkpoint:
        found = evaluation.load(config, checkpoint, mesh)
        if jax.tree.map(jnp.shape, found.loaded.params) != jax.tree.map(jnp.shape, student.params):
            raise UserError(
                f"--checkpoint={checkpoint}: its shape is not that of config.specialised_model = "
                f"{config.specialised_model}; give a student of this config"
            )
        student = student.with_params(jax.device_put(found.loaded.params, jax.tree.map(_place, student.params)))
    state = abstract_state(student.params, None)
    programs = loop.compile_programs(config, student.model, student.eos_ids, state)
    row, answers = Diagnosis(config, models, mesh, programs)(found.step if found else 0, student.params)
    of_prompts = {branch: prompt_sources(config, branch, source_field) for branch in STREAMS}
    row["correlations"] = {branch: selection.correlations(answers[branch], of_prompts[branch]) for branch in answers}
    if found and found.run and (rows := read_rows(found.run / "selection.jsonl")):
        row["training"] = {branch: of_training(rows, branch, of_prompts[branch]) for branch in STREAMS}
    return row


def of_training(rows: list[dict[str, Any]], branch: str, of_prompts: list[str] | None) -> dict[str, Any]:
    """What a whole run's selection followed, from its selection.jsonl."""
    steps = [row for row in rows if row["phase"] == branch]
    told = {
        "steps": len(steps),
        "correlations": selection.over_steps(steps, of_prompts),
        "lengths": selection.lengths(steps),
        "repeats": selection.repeats(steps),
    }
    return told if of_prompts is None else told | {"by_source": selection.rates_by_source(steps, of_prompts)}


def prompt_sources(config: TrainConfig, branch: str, field: str) -> list[str] | None:
    """Where each prompt of a branch's file comes from; None if its rows do not all say, or all say the same."""
    stream = getattr(config, STREAMS[branch])
    rows = sources.read(stream.source, stream.split, stream.limit, f"config.{STREAMS[branch]}.source")
    named = [str(row.get(field, "")) for row in rows]
    return named if all(named) and len(set(named)) > 1 else None


def _place(array: jax.Array) -> Sharding:
    return array.sharding
