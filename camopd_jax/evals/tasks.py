"""The benchmarks by name: what `config.Benchmark.task` may say."""

from camopd_jax.config.schema import Judge
from camopd_jax.evals.graders import choice, exact, gsm8k, ifeval, judge, likelihood, mbpp, zebra
from camopd_jax.evals.task import Task

TASKS: dict[str, Task] = {
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
}
JUDGED = ("roleplay", "writing")


def find(name: str, judged_by: Judge) -> Task:
    return judge.task(name, judged_by) if name in JUDGED else TASKS[name]
