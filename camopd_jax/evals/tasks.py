"""The benchmarks by name: what `task` of a config's benchmark may be.

A new benchmark is a file of graders/ and one line of this table.
"""

from collections.abc import Callable

from camopd_jax.config.schema import Benchmark, Judge
from camopd_jax.errors import UserError
from camopd_jax.evals.graders import choice, exact, gsm8k, ifeval, judge, likelihood, mbpp, zebra
from camopd_jax.evals.task import Task

TASKS: dict[str, Task | Callable[[Judge], Task]] = {  # a function where a language model grades
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
    """The rules of a config's benchmark.

    Args:
      judged_by: the language model that grades, where the benchmark has one grade.

    Raises:
      UserError: if no benchmark has the name that `benchmark.task` gives.
    """
    if benchmark.task not in TASKS:
        raise UserError(
            f"config.evaluation.benchmarks {benchmark.name!r}: task is {benchmark.task!r}; it must be one of "
            f"{', '.join(map(repr, TASKS))}"
        )
    task = TASKS[benchmark.task]
    return task if isinstance(task, Task) else task(judged_by)


def datasets() -> list[tuple[str, str]]:
    """The benchmarks' own datasets, each with the split that holds its questions."""
    tasks = [task for task in TASKS.values() if isinstance(task, Task)]
    return [(task.dataset, task.split) for task in tasks if task.dataset]
