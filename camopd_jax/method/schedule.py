"""Which branches act in a step."""

import numpy as np

from camopd_jax.config.schema import TrainConfig

MIXED = "mixed"  # the phase of a step in which all branches act


def acting(config: TrainConfig, step: int) -> list[str]:
    """The branches of step number `step`, from 0.

    Eq 5: each branch's `steps` in a row, in the order of the config, and again. Under the "mixed" schedule all, always.
    """
    if config.method.schedule == MIXED:
        return list(config.branches)
    within = step % sum(branch.steps for branch in config.branches.values())
    for name, branch in config.branches.items():
        if within < branch.steps:
            return [name]
        within -= branch.steps
    raise AssertionError(config.branches)


def draw(config: TrainConfig, step: int, branch: str) -> np.int32:
    """The number that names the random keys of a branch's answers in a step: no other answers of a run have it."""
    branches = acting(config, step)
    return np.int32(step * len(branches) + branches.index(branch))


def phase(config: TrainConfig, step: int) -> str:
    """What rows of metrics.jsonl call a step: by its branch, or "mixed"."""
    return MIXED if config.method.schedule == MIXED else acting(config, step)[0]


def phases(config: TrainConfig) -> dict[str, float]:
    """The phases of a run, and how often each comes."""
    if config.method.schedule == MIXED:
        return {MIXED: 1.0}
    cycle = sum(branch.steps for branch in config.branches.values())
    return {name: branch.steps / cycle for name, branch in config.branches.items() if branch.steps}


def batch_rows(config: TrainConfig) -> dict[str, int]:
    """Prompts of each branch in a step in which it acts. A mixed batch is split in proportion to their `steps`."""
    rows = config.rollout.batch_size
    if config.method.schedule != MIXED:
        return dict.fromkeys(config.branches, rows)
    cycle = sum(branch.steps for branch in config.branches.values())
    return {name: rows * branch.steps // cycle for name, branch in config.branches.items()}
