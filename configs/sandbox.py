"""The laptop study: every method of camopd_jax/config/methods.py on the quickstart's models.

Command   python -m camopd_jax.compare --config=configs/sandbox.py --workdir=runs/sandbox --seeds=5
Models, prompts  those of configs/quickstart.py.
Questions  configs/sandbox/: of the covered skills, the uncovered ones and the domain, 400 each, in no other file.
Budget    every method has 120 steps of 64 sampled answers.
Hardware  about an hour and a half on 2 CPU cores; --quick, six minutes. docs/results.md has the table.
"""

import runpy
from pathlib import Path

HERE = Path(__file__).parent


def get_config():
    config = runpy.run_path(str(HERE / "quickstart.py"))["get_config"]()
    config.steps = 120
    config.checkpoints.every = 120
    config.checkpoints.keep_best = 0
    config.log.tensorboard = False
    config.evaluation.batch_size = 100
    config.evaluation.benchmarks = tuple(
        dict(name=name, source=str(HERE / "sandbox" / f"{name}.jsonl"), axis=axis, task=task, max_response_tokens=32)
        for name, axis, task in (
            ("covered", "general", "exact"),
            ("uncovered", "general", "exact"),
            ("domain", "domain", "choice"),
        )
    )
    return config
