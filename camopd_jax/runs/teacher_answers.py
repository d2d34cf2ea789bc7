"""Answers that the teachers of a run's branches sample once: in its work directory, as JSON lines to read."""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from camopd_jax.config.schema import Sampling
from camopd_jax.data.pipeline import AnsweredPrompt, TokenisedPrompt
from camopd_jax.evals.answer_file import AnswerFile, Save, answer_key
from camopd_jax.evals.runner import model_key
from camopd_jax.inference.answer import answer
from camopd_jax.method.branches import Branch, Models
from camopd_jax.method.setup import Setup
from camopd_jax.runtime.distributed import broadcast
from camopd_jax.runtime.progress import work

DRAW = 2**29  # of these answers' random keys; the draws of a run's steps are smaller


def teacher_answers(
    setup: Setup, models: Models, branches: Mapping[str, Branch], counts: Mapping[str, int], workdir: epath.Path
) -> dict[str, list[AnsweredPrompt]]:
    """Each branch's teacher answers prompts of the branch, sampled as in a rollout.

    The answers are in workdir/teacher_answers/BRANCH.jsonl, written after each batch. Those that are there are not
    sampled again.

    Args:
      counts: how many prompts of each branch are answered, at even distances in its prompts.
    """
    made = {}
    for name, count in counts.items():
        prompts = spread(branches[name].prompts.prompts, count)
        made[name] = _of_branch(setup, models, name, prompts, workdir / "teacher_answers" / f"{name}.jsonl")
    return made


def spread(rows: Sequence[TokenisedPrompt], count: int) -> list[TokenisedPrompt]:
    """`count` rows at even distances; all rows if there are fewer."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _of_branch(
    setup: Setup, models: Models, branch: str, prompts: list[TokenisedPrompt], path: epath.Path
) -> list[AnsweredPrompt]:
    config, name = setup.config, setup.config.branches[branch].teacher
    sampling, longest = Sampling.of(config.rollout), config.rollout.max_response_tokens
    teacher = dataclasses.replace(models.teacher(name), eos_ids=models.student.eos_ids)
    decode = teacher.tokenizer.decode
    way = [model_key(teacher), repr(sampling), longest, teacher.eos_ids, config.seed]
    keys = [answer_key(prompt.teacher, prompt.index, way) for prompt in prompts]

    def compute(missing: list[int], save: Save) -> None:
        numbers = {prompts[i].index: i for i in missing}
        answer(
            teacher,
            [prompts[i].teacher for i in missing],
            max_new=longest,
            batch_size=config.rollout.batch_size,
            sampling=sampling,
            seed=config.seed,
            draw=DRAW,
            rows=[prompts[i].index for i in missing],
            smallest_bucket=config.rollout.smallest_bucket,
            on_batch=lambda new: save({
                numbers[row]: {
                    "teacher": name,
                    "prompt": decode(prompts[numbers[row]].teacher),
                    "response": one.text,
                    "ids": one.ids,
                    "length": len(one.ids),
                    "entropy": one.entropy,
                    "stopped": one.stopped,
                }
                for row, one in new.items()
            }),
        )  # fmt: skip

    with work(f"answers of the teacher of {branch}", len(prompts), "prompts") as answering:
        rows = AnswerFile(path).complete(keys, compute, answering)
    values = broadcast(lambda: [{name: row[name] for name in ("ids", "entropy", "stopped")} for row in rows])
    return [AnsweredPrompt(prompt, **row) for prompt, row in zip(prompts, values, strict=True)]
