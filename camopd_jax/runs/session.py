"""A run in memory, for notebooks and other programs: steps one at a time, without a work directory."""

from dataclasses import dataclass
from pathlib import Path

import ml_collections
from etils import epath

from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.methods import description
from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference.loading import Loaded
from camopd_jax.method import loop
from camopd_jax.method.branches import Branch, check_models, load_models, make_branches, make_teachers
from camopd_jax.method.optimizer import run_state
from camopd_jax.method.programs import Programs, student_programs
from camopd_jax.method.setup import resolve
from camopd_jax.method.update import Metrics
from camopd_jax.models import partition
from camopd_jax.runs.export import write_folder
from camopd_jax.types import Batch, TrainState


@dataclass(repr=False)
class Session:
    """The parts of a run, which `step` changes; `camopd_jax.method.loop` is what happens in a step.

    `python -m camopd_jax.train` does more: it evaluates, writes every step to files, and resumes.
    """

    branches: dict[str, Branch]
    programs: Programs  # compiled when they are first used
    student: Loaded  # the model and the tokenizer; its parameters are in `state` from the first step on
    state: TrainState
    provenance: dict[str, str]  # the method and the models, for the model card

    def step(self) -> tuple[dict[str, Batch], Metrics]:
        """Does the next step. Returns the batch of each branch that it trained, and the update's metrics."""
        number = int(self.state.step)
        self.state, batches, metrics = loop.step(self.branches, self.programs, self.state, number)
        return batches, metrics

    def token_gaps(self, batch: Batch, row: int) -> list[tuple[str, float]]:
        """The tokens of one answer as text, each with its gap log teacher - log student in nats (Eq 1)."""
        length, decode = int(batch.rollout.lengths[row]), self.student.tokenizer.decode
        tokens, gaps = batch.rollout.tokens[row, :length].tolist(), batch.log_probs.gap[row, :length].tolist()
        return [(decode([token]), gap) for token, gap in zip(tokens, gaps, strict=True)]

    def export(self, folder: str | Path) -> None:
        """Writes the student as a Hugging Face folder, or its adapter as a PEFT folder.

        Raises:
          UserError: if it cannot be written.
        """
        state = self.programs.fetch(self.state)
        write_folder(epath.Path(folder), self.student.with_params(state.evaluated), self.provenance)


def open_session(config: TrainConfig | ml_collections.ConfigDict) -> Session:
    """Loads the models and the prompts of a config.

    Raises:
      UserError: for everything that `train` refuses too; for a warm-up, a start between the models, and prompts drawn
        by a map, which need a work directory.
    """
    if not isinstance(config, TrainConfig):
        config = from_config_dict(TrainConfig, config)
    _check(config)
    setup = resolve(config)
    models = load_models(setup)
    branches = make_branches(setup, models, make_teachers(config, models), setup.rows, config.seed)
    check_models(setup, models, branches)
    state = run_state(partition.trained(models.student.params, config.optimizer.trained), config)
    programs = student_programs(setup, models.student, state, branches)
    provenance = {"method": description(config)} | models.provenance(config)
    return Session(branches, programs, models.student, state, provenance)


def _check(config: TrainConfig) -> None:
    of_branches = {f"branches.{name}.prompts.weights": of.prompts.weights for name, of in config.branches.items()}
    for field, value in {
        "warm_up.steps": config.warm_up.steps,
        "start.interpolation": config.start.interpolation,
        **of_branches,
    }.items():
        if value:
            raise UserError(f"config.{field} is {value!r}, which needs a work directory; use camopd_jax.runs.training")
