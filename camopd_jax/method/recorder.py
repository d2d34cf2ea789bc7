"""What the host does beside the steps: it checks them, and hands them to an observer while the devices work on."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from camopd_jax.errors import UserError
from camopd_jax.method import schedule
from camopd_jax.method.programs import Programs
from camopd_jax.types import Batch, TrainState

LARGEST_SAMPLER_GAP = 1e-3  # nats per token that a trusted sampler may be off a forward pass


@dataclass(frozen=True)
class StepRecord:
    """A finished step. Arrays are global and still on the devices."""

    step: int
    phase: str
    batches: dict[str, Batch]  # of each acting branch
    metrics: dict[str, Any]  # scalars, and the table of answers; in a mixed step, a branch's own under its name
    seconds: dict[str, float]  # by stage


class Observer(Protocol):
    """Writes metrics and samples, saves and evaluates."""

    def log(self, record: StepRecord) -> None:
        """Light work: metrics and samples. Called for step n-1 while the devices roll out step n."""

    def pauses_after(self, steps_done: int) -> bool:
        """Whether `pause` is called between this step and the next."""

    def pause(self, steps_done: int, state: TrainState) -> bool:
        """Checkpoints and evaluations, after `log` of every step so far. True ends the run here."""


class Recorder:
    """Checks every step and passes it on, once."""

    def __init__(self, programs: Programs, observer: Observer):
        self._programs, self._observer = programs, observer
        self._last: StepRecord | None = None

    def record(self, step: int, batches: dict[str, Batch], metrics: dict[str, Any], state: TrainState) -> bool:
        """Takes a finished step. Returns whether the run ends here.

        Raises:
          UserError: if the sampler is trusted, and off.
        """
        config = self._programs.setup.config
        for name in batches:
            self._check_sampler(step, metrics if config.method.schedule != schedule.MIXED else metrics[name])
        phase = schedule.phase(config, step)
        self._last = StepRecord(step, phase, batches, metrics, self._programs.stages.finish())
        if not self._observer.pauses_after(step + 1):
            return False
        self.log_last()
        return self._observer.pause(step + 1, state)

    def log_last(self) -> None:
        """Hands the last step to the observer, if that has not been done."""
        if self._last is not None:
            with self._programs.stages("other"):
                self._observer.log(self._last)
            self._last = None

    def _check_sampler(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Leaves out a sampler gap that compares nothing."""
        programs = self._programs
        if not programs.compares(step) or programs.setup.config.method.answers == "teacher":
            del metrics["sampler_gap"]
        elif programs.setup.trusts_sampler and metrics["sampler_gap"] > LARGEST_SAMPLER_GAP:
            raise UserError(
                f"config.rollout.student_logprobs: at step {step} the sampler's log-probabilities differ from a "
                f'forward pass by {metrics["sampler_gap"]:.4f} nats per token; set it to "forward"'
            )
