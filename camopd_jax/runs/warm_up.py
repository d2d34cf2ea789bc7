"""The warm-up of a run (`config.warm_up`): the training loop on answers that the teachers sampled before."""

from collections.abc import Mapping
from dataclasses import replace

from etils import epath

from camopd_jax.data.pipeline import AnsweredStream
from camopd_jax.method import schedule
from camopd_jax.method.branches import Branch, Models
from camopd_jax.method.setup import Setup
from camopd_jax.runs.teacher_answers import teacher_answers
from camopd_jax.runtime.mesh import rows_of_process


def make_branches(
    setup: Setup, models: Models, branches: Mapping[str, Branch], workdir: epath.Path
) -> dict[str, Branch]:
    """The branches that the warm-up trains. Answers that are not in the work directory are sampled now.

    Args:
      setup: of the warm-up.
      branches: of the other steps.
    """
    config, rows = setup.config, setup.rows
    turns = [name for step in range(config.steps) for name in schedule.active_branches(config, step)]
    counts = {name: min(config.warm_up.prompts, turns.count(name) * rows[name]) for name in dict.fromkeys(turns)}
    answers = teacher_answers(setup, models, branches, counts, workdir)

    def branch(number: int, name: str) -> Branch:
        rollout = replace(config.rollout, batch_size=rows[name])
        seed = len(config.branches) * config.seed + number  # as `method.branches.make_branches`
        stream = AnsweredStream(answers[name], rollout, seed, rows_of_process(setup.mesh, rows[name]))
        return Branch(name, stream, branches[name].teacher, setup.objectives[name])

    return {name: branch(number, name) for number, name in enumerate(config.branches) if name in answers}
