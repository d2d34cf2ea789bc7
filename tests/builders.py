"""Configs, branches and runs of the training loop with tiny random models."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.config.schema import BranchConfig, SelectionConfig, Stream, TrainConfig
from camopd_jax.method import loop
from camopd_jax.method.branches import Branch, Teacher
from camopd_jax.method.optimizer import run_state
from camopd_jax.method.programs import Programs
from camopd_jax.method.recorder import Recorder
from camopd_jax.method.setup import resolve
from camopd_jax.models import partition
from camopd_jax.types import PromptBatch, Prompts


def branch_configs(recovery=None, review=None):
    """The paper's two branches, with changes of some fields."""
    return {
        "recovery": BranchConfig(
            **{"prompts": Stream("g"), "teacher": "general", "scale": 2.0, "steps": 3, **(recovery or {})}
        ),
        "review": BranchConfig(
            **{"prompts": Stream("d"), "teacher": "specialised", "selection": SelectionConfig("positive_gap"),
               **(review or {})}
        ),
    }  # fmt: skip


def train_config(recovery=None, review=None, **fields):
    return TrainConfig("g", "s", **{"branches": branch_configs(recovery, review), **fields})


class Prompter:
    """An endless stream of random prompts with the given widths in turn."""

    def __init__(self, seed, widths=(4, 8), rows=4, vocab=14, least=None):
        self.random, self.widths, self.served = np.random.default_rng(seed), itertools.cycle(widths), 0
        self.rows, self.vocab, self.least = rows, vocab, least

    def __next__(self):
        self.served += 1
        width, n = next(self.widths), self.rows
        lengths = np.full(n, width) if self.least is None else self.random.integers(self.least, width + 1, n)
        prompts = Prompts(self.random.integers(0, self.vocab, (n, width)).astype(np.int32), lengths.astype(np.int32))
        return PromptBatch(prompts, prompts, np.arange(n, dtype=np.int32) + n * self.served)


class SeveralAnswers(Prompter):
    """Each prompt in two consecutive rows, as `PromptStream` repeats them."""

    def __next__(self):
        return jax.tree.map(lambda array: np.repeat(array[::2], 2, axis=0), super().__next__())


class Watcher:
    """An observer that stores every step's record and can end a run."""

    def __init__(self, milestones=(), last=None, end_at=None):
        self.records, self.calls, self.milestones, self.last, self.end_at = [], [], milestones, last, end_at

    def log(self, record):
        self.records.append(record)
        self.calls.append(("log", record.step))

    def pauses_after(self, steps_done):
        return steps_done in self.milestones or steps_done == self.last

    def pause(self, steps_done, state):
        self.calls.append(("milestone", steps_done))
        assert int(state.step) == steps_done
        return steps_done == self.end_at


@dataclasses.dataclass
class Run:
    """A run that has not started."""

    branches: dict
    programs: Programs
    state: object

    def go(self, watcher=None, state=None):
        """Runs its steps; returns the last state."""
        watcher = watcher or Watcher(last=self.programs.setup.config.steps)
        recorder = Recorder(self.programs, watcher)
        return loop.run(self.branches, self.programs, self.state if state is None else state, recorder)


def make_run(config, model, student, teachers, prompters, eos_ids=(2,)):
    """A run of a config.

    Args:
      model: of student and teachers, on a mesh.
      student: parameters, which are copied.
      teachers: parameters of each branch's teacher, which are copied if they are offloaded.
      prompters: the prompt stream of each branch.
    """
    setup = resolve(config, devices=list(model.mesh.devices.flat))
    student = jax.tree.map(jnp.copy, student)
    if config.compute.offload != "off":
        teachers = jax.tree.map(jnp.copy, teachers)
    made = {name: Teacher(model, params) for name, params in teachers.items()}
    if config.compute.offload != "off":
        for teacher in made.values():
            teacher.offload()
    branches = {name: Branch(name, prompters[name], made[name], setup.objectives[name]) for name in config.branches}
    state = run_state(partition.trained(student, config.optimizer.trained), config)
    programs = Programs(setup, model, student, eos_ids, state, {name: model for name in config.branches})
    return Run(branches, programs, state)
