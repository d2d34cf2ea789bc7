"""How long a run takes, by the arithmetic of `costs` and the measured speed of the device at hand."""

import math
import time
from collections.abc import Callable, Mapping
from functools import cache

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import TrainConfig
from camopd_jax.data.pipeline import SELF
from camopd_jax.method.setup import Setup
from camopd_jax.models.config import ModelConfig
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.costs import Answering, Share, step_seconds
from camopd_jax.planning.topology import Chip

REPEATS = 5  # measurements, of which the fastest counts


@cache
def measured_chip(dtype: str, platform: str) -> Chip:
    """This process's device: the speed of a large product and of a large copy, measured in under a second.

    Links between devices are left out.
    """
    width = 1024 if platform == "cpu" else 8192
    square = jnp.ones((width, width), dtype)
    product = _seconds(jax.jit(lambda x: x @ x), square)
    vector = jnp.ones((width * width * (16 if platform == "cpu" else 4),), jnp.float32)
    copy = _seconds(jax.jit(lambda x: x + 1), vector)
    return Chip(platform, 0.0, 2 * width**3 / product, 2 * vector.nbytes / copy, math.inf, 1, 1)


def _seconds(function: Callable[[jax.Array], jax.Array], value: jax.Array) -> float:
    jax.block_until_ready(function(value))  # compiled
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(value))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run_seconds(setup: Setup, models: ModelShapes, chip: Chip, questions: Mapping[str, int]) -> dict[str, float]:
    """The seconds of the parts of a run, without loading and compiling, at the device's limits.

    Args:
      questions: of each benchmark.

    Returns:
      Seconds of "steps", of "evaluations", and of "answers before" that teachers give or prompts that they write. Every
      prompt and answer has the length of its cap.
    """
    config = setup.config
    longest = config.rollout.max_response_tokens
    before = 0.0
    for name, branch in config.branches.items():
        model, prompt = models.shapes[branch.teacher], config.rollout.max_prompt_tokens
        if branch.prompts.source == SELF:
            before += _answering(setup, model, chip, config.rollout.batch_size, branch.prompts.writing.rows, 1, prompt)
        if config.warm_up.steps:
            answers = min(config.warm_up.prompts, config.warm_up.steps * setup.rows[name])
            before += _answering(setup, model, chip, config.rollout.batch_size, answers, prompt, longest)
    return {
        "steps": config.steps * step_seconds(setup, models, longest, chip),
        "evaluations": _evaluations(setup, models, chip, questions),
        "answers before": before,
    }


def _evaluations(setup: Setup, models: ModelShapes, chip: Chip, questions: Mapping[str, int]) -> float:
    """Of both teachers and the student, before, during and after the steps."""
    evaluation, prompt, total = setup.config.evaluation, setup.config.rollout.max_prompt_tokens, 0.0
    during = _evaluations_during(setup.config)
    for benchmark in evaluation.benchmarks:
        count = questions.get(benchmark.name, 0)
        few = min(evaluation.questions or count, count)
        often = {"general": count, "specialised": count, "student": count + during * few}
        for name, asked in often.items():
            model = models.student if name == "student" else models.shapes[name]
            rows, answers = evaluation.batch_size, asked * benchmark.samples
            total += _answering(setup, model, chip, rows, answers, prompt, benchmark.max_response_tokens)
    return total


def _evaluations_during(config: TrainConfig) -> int:
    every = config.evaluation.every
    return (config.steps - 1) // every if every else 0


def _answering(setup: Setup, model: ModelConfig, chip: Chip, rows: int, count: int, prompt: int, answer: int) -> float:
    """Seconds in which `count` prompts of `prompt` tokens get answers of `answer` tokens, `rows` at a time."""
    batch = Answering(rows=rows, prompts=rows, lanes=rows, prefills=1, cap=answer)
    stages = Share(model, setup.rollout_mesh, setup.dtype).answering(batch, prompt, answer)
    return count / rows * sum(work.seconds(chip, setup.mesh.size) for work in stages.values())


def duration(seconds: float) -> str:
    if seconds == 0:
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
