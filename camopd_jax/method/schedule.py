"""Which branches a step trains (Eq 5)."""

import numpy as np

from camopd_jax.config.schema import TrainConfig

MIXED = "mixed"  # the phase of a step that trains all branches


def active_branches(config: TrainConfig, step: int) -> list[str]:
    """Names of the branches that step `step` (from 0) trains.

    Eq 5: a cycle has `steps` consecutive steps of each branch, in the order of the config. With the "mixed" schedule,
    every step trains all branches.
    """
    if config.method.schedule == MIXED:
        return list(config.branches)
    within = step % sum(branch.steps for branch in config.branches.values())
    for name, branch in config.branches.items():
        if within < branch.steps:
            return [name]
        within -= branch.steps
    raise AssertionError(config.branches)


def draw_number(config: TrainConfig, step: int, branch: str) -> np.int32:
    """A number that is different for each batch of answers of a run; its random keys are derived from it."""
    branches = active_branches(config, step)
    return np.int32(step * len(branches) + branches.index(branch))


def phase(config: TrainConfig, step: int) -> str:
    """The `phase` of a step in metrics.jsonl: the name of its branch, or "mixed"."""
    return MIXED if config.method.schedule == MIXED else active_branches(config, step)[0]


def phases(config: TrainConfig) -> dict[str, float]:
    """The phases of a run, each with its share of the steps."""
    if config.method.schedule == MIXED:
        return {MIXED: 1.0}
    cycle = sum(branch.steps for branch in config.branches.values())
    return {name: branch.steps / cycle for name, branch in config.branches.items() if branch.steps}


def batch_rows(config: TrainConfig) -> dict[str, int]:
    """Prompts of each branch in a step that trains it. A mixed batch is split in proportion to the fields `steps`."""
    rows = config.rollout.batch_size
    if config.method.schedule != MIXED:
        return dict.fromkeys(config.branches, rows)
    cycle = sum(branch.steps for branch in config.branches.values())
    return {name: rows * branch.steps // cycle for name, branch in config.branches.items()}
