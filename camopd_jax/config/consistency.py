"""Checks between the fields of a config. The limits of single fields are in schema.py."""

import re
from typing import Any

import ml_collections

from camopd_jax.config.build import build
from camopd_jax.config.schema import AUTO, MOVED, BranchConfig, Config, Evaluation, Sampling, SftConfig, TrainConfig
from camopd_jax.errors import UserError


def from_config_dict(cls: type, config: ml_collections.ConfigDict) -> Any:
    """Builds and checks a `TrainConfig` or `SftConfig`.

    Raises:
      UserError: naming the field, for unknown or missing keys, wrong types and invalid values.
    """
    return checked(build(cls, config.to_dict(), "config", MOVED))


def checked(config: Config) -> Config:
    """Returns the config if its fields are consistent.

    Raises:
      UserError: naming the field that is not.
    """
    _check_evaluation(config.evaluation)
    if isinstance(config, TrainConfig):
        _check_train(config)
    else:
        _check_sft(config)
    return config


def warnings(config: Config) -> list[str]:
    """What is allowed in a config and hardly ever meant."""
    if config.compute.params != "bfloat16":
        return []
    # A bfloat16 number w keeps its value when less than 2^-9 |w| is added. Adam's steps are about the learning rate.
    moved = 2**9 * config.optimizer.learning_rate
    if moved >= TYPICAL_WEIGHT:
        return []
    return [
        f'config.compute.params is "bfloat16": steps of learning_rate {config.optimizer.learning_rate:.2g} change only '
        f'weights below {moved:.2g}, larger ones round back to what they were; use "float32"'
    ]


TYPICAL_WEIGHT = 0.02  # the standard deviation that most models are initialised with


def _need(holds: bool, name: str, value: Any, advice: str) -> None:
    if not holds:
        raise UserError(f"config.{name} is {value!r}; {advice}")


def _check_sft(config: SftConfig) -> None:
    _need(config.compute.remat != "rollout", "compute.remat", "rollout", "fine-tuning has no rollout; give block")
    _need(config.compute.remat != AUTO, "compute.remat", AUTO, "which only train chooses; give block")
    micro, advice = config.optimizer.micro_batch, f"give a divisor of batch_size = {config.batch_size}"
    _need(micro != AUTO and config.batch_size % micro == 0, "optimizer.micro_batch", micro, advice)
    _need(not config.data.weights, "data.weights", config.data.weights, "fine-tuning uses all rows equally; give ''")
    _check_trained(config.optimizer.trained)


def _check_evaluation(config: Evaluation) -> None:
    names = [b.name for b in config.benchmarks]
    _need(len(set(names)) == len(names), "evaluation.benchmarks", names, "give each benchmark its own name")
    for b in config.benchmarks:
        block = f"evaluation.benchmarks {b.name!r}:"
        named = re.fullmatch(r"[\w.-]+", b.name) is not None
        _need(named, f"{block} name", b.name, "give a name of letters, digits, -, _ and .")
        several = b.samples == 1 or b.temperature > 0
        _need(several, f"{block} samples", b.samples, "greedy answers are all the same; give 1, or set temperature > 0")


def _check_train(config: TrainConfig) -> None:
    rollout, method, optimizer = config.rollout, config.method, config.optimizer
    several = rollout.answers_per_prompt
    answers = rollout.batch_size * several
    divisor = f"give a divisor of rollout.batch_size = {answers}"
    if several > 1:
        divisor = f"give a divisor of rollout.batch_size x rollout.answers_per_prompt = {answers}"
    micro, scored = optimizer.micro_batch, rollout.score_batch
    _need(micro == AUTO or answers % micro == 0, "optimizer.micro_batch", micro, divisor)
    advice = f"{divisor}, or 0 (the same as optimizer.micro_batch)"
    _need(not scored or answers % scored == 0, "rollout.score_batch", scored, advice)
    _check_several_answers(config)
    _check_sampler(config)
    keeps = config.compute.remat == "rollout"
    advice = "give 0, or a compute.remat other than 'rollout'"
    _need(not keeps or not rollout.concurrency, "rollout.concurrency", rollout.concurrency, advice)
    by_student = method.answers == "student"
    advice = "it needs rollouts of the student, but method.answers is 'teacher'; give block"
    _need(not keeps or by_student, "compute.remat", config.compute.remat, advice)
    gate = method.importance_gate
    advice = "give (low, high) with low <= 1 <= high, or None"
    _need(gate is None or 0 <= gate[0] <= 1 <= gate[1], "method.importance_gate", gate, advice)
    advice = "it needs answers of the student, but method.answers is 'teacher'; give None"
    _need(gate is None or by_student, "method.importance_gate", gate, advice)
    advice = f"give less than steps = {config.steps}, the first of which are the warm-up"
    _need(config.warm_up.steps < config.steps, "warm_up.steps", config.warm_up.steps, advice)
    rows, at_once = config.diagnostics.rows, config.diagnostics.micro_batch
    advice = f"give a divisor of diagnostics.rows = {rows}"
    _need(rows % at_once == 0, "diagnostics.micro_batch", at_once, advice)
    _check_trained(optimizer.trained)
    _check_branches(config)


def _check_several_answers(config: TrainConfig) -> None:
    rollout, several = config.rollout, config.rollout.answers_per_prompt
    wider, advice = rollout.exploration, "it is of further answers to a prompt; give None, or answers_per_prompt > 1"
    _need(wider is None or several > 1, "rollout.exploration", wider, advice)
    for name, branch in config.branches.items():
        advice = "it compares answers to one prompt; give mass, or rollout.answers_per_prompt > 1"
        _need(several > 1 or branch.selection.keep != "density", f"branches.{name}.selection.keep", "density", advice)
    if several == 1:
        return
    valid = wider is None or (wider[0] > 0 and 0 < wider[1] <= 1)
    _need(valid, "rollout.exploration", wider, "give (temperature, top-p) with temperature > 0 and 0 < top-p <= 1")
    advice = "greedy answers to a prompt are all the same; give 1, or rollout.temperature > 0"
    _need(wider is not None or rollout.temperature > 0, "rollout.answers_per_prompt", several, advice)
    advice = f"give a multiple of rollout.answers_per_prompt = {several}, whose answers start at the same time"
    _need(rollout.concurrency % several == 0, "rollout.concurrency", rollout.concurrency, f"{advice}, or 0")
    if config.diagnostics.every:
        advice = f"give a multiple of rollout.answers_per_prompt = {several}"
        _need(config.diagnostics.rows % several == 0, "diagnostics.rows", config.diagnostics.rows, advice)


def _check_sampler(config: TrainConfig) -> None:
    rollout, sampler = config.rollout, config.rollout.sampler
    if sampler == "student":
        return
    advice = f"with rollout.sampler {sampler!r} student and teacher sample together; give "
    _need(config.method.answers == "student", "method.answers", config.method.answers, f'{advice}"student"')
    _need(rollout.exploration is None, "rollout.exploration", rollout.exploration, f"{advice}None")
    _need(rollout.student_logprobs != "sampler", "rollout.student_logprobs", "sampler", f'{advice}"auto" or "forward"')
    _need(config.compute.remat != "rollout", "compute.remat", "rollout", f'{advice}"block"')
    if sampler == "mixed":
        for name, value in vars(Sampling()).items():
            advice = f"the mixture is of both models' own distributions; give {value}"
            _need(getattr(rollout, name) == value, f"rollout.{name}", getattr(rollout, name), advice)
    else:
        gate, advice = (
            config.method.importance_gate,
            'rollout.sampler "speculative" has no importance weights; give None',
        )
        _need(gate is None, "method.importance_gate", gate, advice)


def _check_trained(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.optimizer.trained is {pattern!r}, not a regular expression ({error})") from error


def _check_branches(config: TrainConfig) -> None:
    branches, method = config.branches, config.method
    for name, branch in branches.items():
        _check_branch(name, branch)
    cycle = sum(branch.steps for branch in branches.values())
    _need(cycle > 0, "branches", list(branches), "at least one of them needs steps > 0")
    mixed = method.schedule == "mixed"
    advice = 'it combines gradients of a mixed step; give "sum", or method.schedule "mixed"'
    _need(mixed or method.conflict == "sum", "method.conflict", method.conflict, advice)
    advice = 'it compares the branches of a mixed step; give "none", or method.schedule "mixed"'
    _need(mixed or method.balance == "none", "method.balance", method.balance, advice)
    for name, branch in branches.items():
        _check_update(name, branch, branches, mixed)
    over_steps = method.split == "over_steps"
    _need(mixed or not over_steps, "method.split", method.split, 'it splits a mixed batch; give "exact"')
    if not mixed:
        return
    idle = [name for name, branch in branches.items() if branch.steps == 0]
    advice = f"every branch needs a share of a mixed batch; give branches.{''.join(idle[:1])}.steps > 0"
    _need(not idle, "method.schedule", method.schedule, advice)
    size = config.rollout.batch_size
    advice = f"give a multiple of {cycle}, the sum of the branches' steps: they split a mixed batch"
    _need(over_steps or size % cycle == 0, "rollout.batch_size", size, f'{advice}; or method.split "over_steps"')
    for name, branch in branches.items() if over_steps else ():
        every = branch.selection.keep == "mass" and branch.selection.mass == 1
        advice = 'method.split "over_steps" needs every answer; give keep "mass" and mass 1'
        _need(every, f"branches.{name}.selection", (branch.selection.keep, branch.selection.mass), advice)
    _need(method.moments == "shared", "method.moments", method.moments, 'a mixed step has one gradient; give "shared"')


def _check_update(name: str, branch: BranchConfig, branches: dict[str, BranchConfig], mixed: bool) -> None:
    advice = "a mixed step has one gradient; give None, or method.schedule 'alternate'"
    _need(not mixed or branch.clip_norm is None, f"branches.{name}.clip_norm", branch.clip_norm, advice)
    other = branch.project_against
    if not other:
        return
    _need(not mixed, f"branches.{name}.project_against", other, advice.replace("None", "''"))
    names = [key for key, of in branches.items() if key != name and of.steps > 0]
    advice = f"name another branch with steps > 0, of {', '.join(names)}" if names else "no other branch has steps > 0"
    _need(other in names, f"branches.{name}.project_against", other, advice)


RESERVED = ("mixed", "sft", "diagnostics", "shared")  # names with another meaning in metrics.jsonl or among moments


def _check_branch(name: str, branch: BranchConfig) -> None:
    plain = re.fullmatch(r"[A-Za-z][\w-]*", name) is not None and name not in RESERVED
    _need(plain, "branches", name, f"name it with letters, digits, - and _, and not one of {', '.join(RESERVED)}")
    source = branch.prompts.source
    _need(bool(source), f"branches.{name}.prompts.source", source, "name a file or dataset of prompts")
    heat = branch.prompts.writing.sampling.temperature
    _need(heat > 0, f"branches.{name}.prompts.writing.sampling.temperature", heat, "greedy texts are all the same")
