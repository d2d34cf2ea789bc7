"""The tasks by name, as in the config field `task` of a benchmark.

A new task needs a file in graders/ and a line in this table.
"""

from collections.abc import Callable

from camopd_jax.config.schema import Benchmark, Judge
from camopd_jax.errors import UserError
from camopd_jax.evals.graders import choice, exact, gsm8k, ifeval, judge, likelihood, mbpp, zebra
from camopd_jax.evals.task import Task

TASKS: dict[str, Task | Callable[[Judge], Task]] = {  # a function if a language model grades
    "exact": exact.TASK,
    "likelihood": likelihood.TASK,
    "choice": choice.CHOICE,
    "medqa": choice.MEDQA,
    "medmcqa": choice.MEDMCQA,
    "pubmedqa": choice.PUBMEDQA,
    "arc": choice.ARC,
    "gsm8k": gsm8k.TASK,
    "zebra": zebra.TASK,
    "ifeval": ifeval.TASK,
    "mbpp": mbpp.TASK,
    "roleplay": judge.roleplay,
    "writing": judge.writing,
}


def find(benchmark: Benchmark, judged_by: Judge) -> Task:
    """The task of a config's benchmark.

    Args:
      judged_by: the language model that grades, for tasks that need one.

    Raises:
      UserError: if `benchmark.task` is not the name of a task.
    """
    if benchmark.task not in TASKS:
        raise UserError(
            f"config.evaluation.benchmarks {benchmark.name!r}: task is {benchmark.task!r}; it must be one of "
            f"{', '.join(map(repr, TASKS))}"
        )
    task = TASKS[benchmark.task]
    return task if isinstance(task, Task) else task(judged_by)


def datasets() -> list[tuple[str, str]]:
    """The tasks' own datasets, each with the split of its questions."""
    tasks = [task for task in TASKS.values() if isinstance(task, Task)]
    return [(task.dataset, task.split) for task in tasks if task.dataset]
