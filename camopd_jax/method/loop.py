"""The loop of CaMOPD (arXiv 2605.27115, Algorithm 1).

The life of one step:

    1. branch    recovery, recovery, recovery, review, ...: only one acts                    (Eq 5)
    2. prompts   the next batch of that branch's own stream
    3. rollout   the student answers, by sampling from itself
    4. score     student and the branch's one teacher: log-probabilities of those answers    (Eq 1)
    5. select    the smallest set of answers that holds 80 % of the gap mass                 (Eq 6-8)
    6. gradient  of the branch's objective, over the selected answers alone                  (Eq 9)
    7. update    one AdamW step, `recovery_update` or `review_update`: each compiled for itself

Recovery: general prompts, the original model teaches. Review: domain prompts, the specialised model's frozen copy
teaches. The two never share a gradient, save under `config.method.schedule = "mixed"`, the control: there all branches
go through 2 to 6, and one update takes all gradients.

What is compiled, timed and offloaded is in `programs`, what is checked and written in `recorder`.
"""

from camopd_jax.method import schedule
from camopd_jax.method.branches import Branch
from camopd_jax.method.programs import Programs
from camopd_jax.method.recorder import Recorder
from camopd_jax.types import Batch, TrainState


def run(branches: dict[str, Branch], programs: Programs, state: TrainState, recorder: Recorder) -> TrainState:
    """Runs the steps from `state.step` to `config.steps`, or until the recorder ends the run."""
    config = programs.setup.config
    for step in range(int(state.step), config.steps):
        batches = {}
        for name in schedule.acting(config, step):
            batches[name] = collect(branches[name], programs, state, step, recorder)
        gradients, batches = programs.gradients(branches, state, batches)
        state, metrics = programs.update(state, gradients, batches)
        if recorder.record(step, batches, metrics, state):
            break
    return state


def collect(branch: Branch, programs: Programs, state: TrainState, step: int, recorder: Recorder) -> Batch:
    """A branch's answers in one step, scored and ranked."""
    draw = schedule.draw(programs.setup.config, step, branch.name)
    prompts = programs.next_prompts(branch)
    answers = programs.generate(branch, state, prompts, draw, meanwhile=recorder.log_last)
    log_probs, teacher = programs.score(branch, state, prompts, answers, programs.compares(step))
    selection = programs.select(branch, log_probs, answers, draw)
    return Batch(prompts.student, prompts.index, answers, log_probs, selection, teacher)
