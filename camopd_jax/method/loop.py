"""The training loop of CaMOPD (arXiv 2605.27115, Algorithm 1).

Each step does the following:

    1. branch    b = S(t): n_g recoveries, n_d reviews, and again (`branch.steps`)               (Eq 5)
    2. prompts   the next batch of the branch's prompts D_b
    3. rollout   the student samples one answer y to each prompt
    4. score     the student and the branch's teacher T_b: log-probabilities of y, the gap
                 delta = log T_b - log student at each token                                   (Eq 1)
    5. select    the gap mass s_b of each answer, and the smallest set of answers that has
                 the share rho_b of the batch's gap mass                                       (Eq 6-8)
    6. gradient  of the branch's objective on the selected answers, with the scale r_b, the
                 importance weight w_t and the mean over tokens, then answers                  (Eq 9)
    7. update    one AdamW step against it, compiled for each branch as `recovery_update`, `review_update`

Recovery (g in the paper) has general prompts, and its teacher is the original model. Review (d) has domain prompts, and
its teacher is a frozen copy of the specialised model, from which the student starts. A step uses only one branch's
gradient. The exception, for comparison, is `config.method.schedule = "mixed"`: items 2 to 6 are done for every branch,
and one update uses the sum of their gradients (Eq 3).

`programs` compiles, times and offloads the functions used here; `recorder` checks and writes the results.
"""

from collections.abc import Callable

from camopd_jax.method import schedule
from camopd_jax.method.branches import Branch
from camopd_jax.method.programs import Programs
from camopd_jax.method.recorder import Recorder
from camopd_jax.method.update import Metrics
from camopd_jax.types import Batch, TrainState

Meanwhile = Callable[[], None]


def run(branches: dict[str, Branch], programs: Programs, state: TrainState, recorder: Recorder) -> TrainState:
    """Runs the steps from `state.step` to `config.steps`, or until the recorder ends the run."""
    for number in range(int(state.step), programs.setup.config.steps):
        state, batches, metrics = step(branches, programs, state, number, recorder.log_last)
        if recorder.record(number, batches, metrics, state):
            break
    return state


def step(
    branches: dict[str, Branch], programs: Programs, state: TrainState, number: int, meanwhile: Meanwhile | None = None
) -> tuple[TrainState, dict[str, Batch], Metrics]:
    """Step `number`, counted from 0.

    Args:
      state: its arrays are replaced by those of the new state.
      meanwhile: called while the devices sample.

    Returns:
      The new state, the batch of each branch that was trained, and the update's metrics.
    """
    batches = {}
    for name in schedule.active_branches(programs.setup.config, number):
        batches[name] = collect(branches[name], programs, state, number, meanwhile)
    gradients, batches = programs.gradients(branches, state, batches)  # batches without what it alone needed
    state, metrics = programs.update(state, gradients, batches)
    return state, batches, metrics


def collect(
    branch: Branch, programs: Programs, state: TrainState, number: int, meanwhile: Meanwhile | None = None
) -> Batch:
    """Samples, scores and selects one batch of a branch's answers (items 2 to 5)."""
    draw = schedule.draw_number(programs.setup.config, number, branch.name)  # for random keys
    prompts = programs.next_prompts(branch)
    answers = programs.generate(branch, state, prompts, draw, meanwhile)
    forward = programs.needs_student_forward(number)  # or the sampler's own log-probabilities are the student's
    log_probs, teacher_record = programs.score(branch, state, prompts, answers, forward)
    selection = programs.select(branch, log_probs, answers, draw, number)
    return Batch(prompts.student, prompts.index, answers, log_probs, selection, teacher_record)
