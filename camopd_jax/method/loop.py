"""The training loop of CaMOPD (arXiv 2605.27115, Algorithm 1).

Each step does the following:

    1. branch    choose one branch: recovery, recovery, recovery, review, recovery, ...        (Eq 5)
    2. prompts   read the next batch from this branch's prompt stream
    3. rollout   the student samples one answer to each prompt
    4. score     the student and the branch's teacher compute log-probabilities of the answers (Eq 1)
    5. select    keep the smallest set of answers that has 80 % of the gap mass                (Eq 6-8)
    6. gradient  compute the gradient of the branch's objective on the selected answers        (Eq 9)
    7. update    do one AdamW step along this gradient: `recovery_update` or `review_update`

The recovery branch has general prompts, and its teacher is the original model. The review branch has domain prompts,
and its teacher is a frozen copy of the specialised model. A step uses only one branch's gradient. The exception, for
comparison, is `config.method.schedule = "mixed"`: lines 2 to 6 run for every branch, and one update uses all gradients.

`programs` compiles, times and offloads the functions used here; `recorder` checks and writes the results.
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
        for name in schedule.active_branches(config, step):
            batches[name] = collect(branches[name], programs, state, step, recorder)
        gradients, batches = programs.gradients(branches, state, batches)
        state, metrics = programs.update(state, gradients, batches)
        if recorder.record(step, batches, metrics, state):
            break
    return state


def collect(branch: Branch, programs: Programs, state: TrainState, step: int, recorder: Recorder) -> Batch:
    """Samples, scores and selects one batch of a branch's answers (lines 2 to 5)."""
    draw = schedule.draw_number(programs.setup.config, step, branch.name)
    prompts = programs.next_prompts(branch)
    answers = programs.generate(branch, state, prompts, draw, meanwhile=recorder.log_last)
    log_probs, teacher = programs.score(branch, state, prompts, answers, programs.needs_student_forward(step))
    selection = programs.select(branch, log_probs, answers, draw)
    return Batch(prompts.student, prompts.index, answers, log_probs, selection, teacher)
