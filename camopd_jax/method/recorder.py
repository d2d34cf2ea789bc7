"""Checks the metrics of each step, and passes them to an observer while the devices compute the next step."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from camopd_jax.errors import UserError
from camopd_jax.method import schedule
from camopd_jax.method.programs import Programs
from camopd_jax.types import Batch, TrainState

# Nats per token: limit on the difference between log-probabilities from sampling and from a forward pass
LARGEST_SAMPLER_GAP = 1e-3


@dataclass(frozen=True)
class StepRecord:
    """The results of a step. Arrays are global and on the devices."""

    step: int
    phase: str
    prefix: str  # what precedes the names of branches in the files
    batches: dict[str, Batch]  # of each branch that the step trains
    metrics: dict[str, Any]  # scalars, and the table of answers; in a mixed step also each branch's, under its name
    seconds: dict[str, float]  # by stage


class Observer(Protocol):
    """Writes metrics and samples, saves checkpoints and evaluates."""

    def log(self, record: StepRecord) -> None:
        """Writes metrics and samples. Called for step n-1 during the rollout of step n."""

    def pauses_after(self, steps_done: int) -> bool:
        """Whether `pause` must be called after this many steps."""

    def pause(self, steps_done: int, state: TrainState) -> bool:
        """Saves and evaluates; called after `log` of all steps so far. Returns whether the run ends here."""


class Recorder:
    """Checks each step and passes it to the observer once."""

    def __init__(self, programs: Programs, observer: Observer):
        self._programs, self._observer = programs, observer
        self._last: StepRecord | None = None
        self.ended = False  # whether the run has ended

    def record(self, step: int, batches: dict[str, Batch], metrics: dict[str, Any], state: TrainState) -> bool:
        """Checks a step and stores it for the observer. Returns whether the run ends here.

        Raises:
          UserError: if log-probabilities from sampling are used and differ too much from a forward pass.
        """
        config = self._programs.setup.config
        for name in batches:
            self._check_sampler(step, metrics if config.method.schedule != schedule.MIXED else metrics[name])
        phase, prefix = schedule.phase(config, step), schedule.prefix(config)
        self._last = StepRecord(step, phase, prefix, batches, metrics, self._programs.stages.finish())
        if not self._observer.pauses_after(step + 1):
            return False
        self.log_last()
        self.ended = self._observer.pause(step + 1, state)
        return self.ended

    def log_last(self) -> None:
        """Passes the last step to the observer, unless that has been done."""
        if self._last is not None:
            with self._programs.stages("other"):
                self._observer.log(self._last)
            self._last = None

    def _check_sampler(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Checks the sampler gap, or removes it from the metrics if the student did no forward pass."""
        programs = self._programs
        if not programs.needs_student_forward(step) or not programs.setup.records_student:
            del metrics["sampler_gap"]
        elif programs.setup.trusts_sampler and metrics["sampler_gap"] > LARGEST_SAMPLER_GAP:
            raise UserError(
                f"config.rollout.student_logprobs: at step {step} the sampler's log-probabilities differ from a "
                f'forward pass by {metrics["sampler_gap"]:.4f} nats per token; set it to "forward"'
            )
