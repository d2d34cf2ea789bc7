"""The parts of a run, and which branches a step trains (Eq 5)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from camopd_jax.config.schema import BranchConfig, SelectionConfig, SftConfig, TrainConfig
from camopd_jax.errors import UserError

Step = Any  # int or int32[]
MIXED = "mixed"  # the phase of a step that trains all branches


def parts(config: TrainConfig) -> list[TrainConfig]:
    """The configs of a run's parts, each for the steps up to its own `steps`: the warm-up, if there is one, and the
    on-policy steps after it.
    """
    return [_warm_up(config), config] if config.warm_up.steps else [config]


def _warm_up(config: TrainConfig) -> TrainConfig:
    """The same run up to the end of its warm-up: cross-entropy on every answer, which the teachers give.

    Each prompt has one answer there, and a step has as many answers as the others.
    """
    plain = BranchConfig(objective="cross_entropy", selection=SelectionConfig(mass=1.0))
    branches = {
        name: replace(plain, prompts=branch.prompts, teacher=branch.teacher, steps=branch.steps)
        for name, branch in config.branches.items()
    }
    rate, remat, rollout = config.warm_up.learning_rate, config.compute.remat, config.rollout
    rows = rollout.batch_size * rollout.answers_per_prompt
    return replace(
        config,
        steps=config.warm_up.steps,
        branches=branches,
        rollout=replace(rollout, batch_size=rows, answers_per_prompt=1, sampler="student"),
        method=replace(config.method, answers="teacher", importance_gate=None, balance="none"),
        optimizer=config.optimizer if rate is None else replace(config.optimizer, learning_rate=rate),
        compute=replace(config.compute, remat="block" if remat == "rollout" else remat),
    )


def first_step(config: TrainConfig | SftConfig) -> int:
    """The first step of a part of a run, from its config."""
    return 0 if isinstance(config, SftConfig) or _warms_up(config) else config.warm_up.steps


def _warms_up(config: TrainConfig) -> bool:
    """Whether a part of a run is its warm-up: its config ends with the warm-up."""
    return 0 < config.steps <= config.warm_up.steps


def prefix(config: TrainConfig) -> str:
    """What precedes the names of branches in a run's files in the steps of a part, from its config."""
    return "warm_up/" if _warms_up(config) else ""


def active_branches(config: TrainConfig, step: int) -> list[str]:
    """Names of the branches that step `step` (from 0) trains.

    Args:
      config: of the step's part of the run.

    Eq 5: a cycle has `steps` consecutive steps of each branch, in the order of the config. With the "mixed" schedule,
    every step trains all branches.
    """
    if config.method.schedule == MIXED:
        return list(config.branches)
    within = (step - first_step(config)) % sum(branch.steps for branch in config.branches.values())
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
    """The `phase` of a step in metrics.jsonl: the name of its branch, or "mixed", after its part's prefix."""
    return prefix(config) + (MIXED if config.method.schedule == MIXED else active_branches(config, step)[0])


def phases(config: TrainConfig) -> dict[str, float]:
    """The phases of a run, each with its share of the steps."""
    if config.method.schedule == MIXED:
        return {MIXED: 1.0}
    cycle = sum(branch.steps for branch in config.branches.values())
    return {name: branch.steps / cycle for name, branch in config.branches.items() if branch.steps}


def batch_rows(config: TrainConfig, unit: int = 1) -> dict[str, int]:
    """Answers of each branch in a step that trains it. A mixed batch is split in proportion to the fields `steps`.

    Args:
      unit: with `config.method.split == "over_steps"`, the number that divides every branch's prompts; `trained_rows`
        of the answers are trained.

    Raises:
      UserError: if no prompts of a mixed batch are left for the branch with the most steps.
    """
    prompts, several = config.rollout.batch_size, config.rollout.answers_per_prompt
    if config.method.schedule != MIXED:
        return dict.fromkeys(config.branches, prompts * several)
    steps = {name: branch.steps for name, branch in config.branches.items()}
    cycle = sum(steps.values())
    if config.method.split == "exact":
        return {name: prompts * n // cycle * several for name, n in steps.items()}
    most = max(steps, key=steps.__getitem__)
    rows = {name: -(-prompts * n // (cycle * unit)) * unit for name, n in steps.items()}
    rows[most] = prompts - sum(n for name, n in rows.items() if name != most)
    if rows[most] < 1:
        raise UserError(
            f"config.rollout.batch_size is {prompts}, of which none is left for {most}: the other branches have "
            f"{prompts - rows[most]}, multiples of data x fsdp = {unit}; give a larger batch"
        )
    return {name: n * several for name, n in rows.items()}


def trained_rows(config: TrainConfig, rows: Mapping[str, int], step: Step) -> dict[str, Step]:
    """How many of each branch's answers a mixed step trains, the first ones of its batch.

    With `config.method.split == "over_steps"`, the branch with the most steps trains all its R rows, and another one
    `floor((t + 1) c) - floor(t c)` in step t, with `c = R steps / (the most steps)`: any number of steps has its share
    up to one prompt.

    Args:
      rows: `batch_rows`.
      step: from 0; a number, or int32[] in a compiled function.
    """
    steps = {name: branch.steps for name, branch in config.branches.items()}
    if config.method.schedule != MIXED or config.method.split == "exact":
        return dict(rows)
    most, several = max(steps, key=steps.__getitem__), config.rollout.answers_per_prompt
    parts, prompts = steps[most], rows[most] // several

    def trained(n: int) -> Step:
        each, rest = divmod(prompts * n, parts)
        return (each + (step % parts * rest % parts + rest) // parts) * several  # small numbers, for int32

    return {name: rows[name] if name == most else trained(n) for name, n in steps.items()}
