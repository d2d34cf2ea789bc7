"""Why a run does what it does: gradients of its two branches, and what its selection follows.

    python -m camopd_jax.analyze --config=configs/quickstart.py
    python -m camopd_jax.analyze --config=configs/quickstart.py --checkpoint=runs/quickstart --out=analysis.jsonl
    python -m camopd_jax.analyze --config=configs/smollm2.py --checkpoint=runs/smollm2/checkpoints/4 \\
        --config.diagnostics.sketch=4095

Takes any student: a Hugging Face folder, a run's work directory (its last checkpoint) or one step of it; without
--checkpoint the specialised model, where every run begins. It answers `config.diagnostics.rows` prompts of each
branch; tables show how far the answers' gradients pull one way, how far the branches pull against each other, and how
the selection's score goes with length, truncation, entropy, difficulty and prompt source. Where the checkpoint belongs
to a run with a selection.jsonl, the same of all the run's steps follows. --out adds the figures as a line of JSON.
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from jax.sharding import Sharding
from rich.console import Console

from camopd_jax import cli, engine, evaluate, phases
from camopd_jax.analysis import selection, tables
from camopd_jax.branches import STREAMS, load_models
from camopd_jax.config import TrainConfig
from camopd_jax.data import sources
from camopd_jax.diagnosis import Diagnosis
from camopd_jax.errors import UserError
from camopd_jax.jsonl import append_rows, read_rows
from camopd_jax.optim import abstract_state
from camopd_jax.processes import first
from camopd_jax.sharding import check_rows, make_mesh


def analyze(config: TrainConfig, checkpoint: str | None, source_field: str) -> dict[str, Any]:
    """The figures of one student: a row as of diagnostics.jsonl, and under "training" those of the run's every step."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_rows(mesh, "config.diagnostics.rows", config.diagnostics.rows)
    models = load_models(config, mesh)
    student, found = models.student, None
    if checkpoint:
        found = evaluate.load(config, checkpoint, mesh)
        if jax.tree.map(jnp.shape, found.loaded.params) != jax.tree.map(jnp.shape, student.params):
            raise UserError(
                f"--checkpoint={checkpoint}: its shape is not that of config.specialised_model = "
                f"{config.specialised_model}; give a student of this config"
            )
        student = student.with_params(jax.device_put(found.loaded.params, jax.tree.map(_place, student.params)))
    state = abstract_state(student.params, None)
    programs = phases.compile_programs(config, student.model, student.eos_ids, state)
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


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Hugging Face folder, work directory of a run, or its checkpoints/STEP.")
    flags.DEFINE_string("source_field", "source", "Field of a prompt's row that tells where it comes from.")
    flags.DEFINE_string("out", None, "JSONL file that gets a line with the figures.")
    read_config = cli.config_flag(TrainConfig)
    cli.define_processes()

    def main() -> None:
        values, config = flags.FLAGS, read_config()
        engine.start(cli.processes())
        row = analyze(config, values.checkpoint, values.source_field)
        if values.out and first():
            append_rows(epath.Path(values.out), [row | {"checkpoint": values.checkpoint or config.specialised_model}])
        console = Console(highlight=False, quiet=not first())
        for table in tables.of_row(row):
            console.print(table)

    cli.run(main)
