"""Role-play and creative writing, scored from 1 to 10 by a language model at an OpenAI-compatible endpoint.

It needs `config.evaluation.judge` with an endpoint and a model. The key is read only from the environment variable
OPENAI_API_KEY; it is not stored or printed. If the model's reply has no score, it is requested again. After three
attempts the answer counts as unmarked, with a grade of 0.
"""

import importlib.util
import os
import re
from functools import partial

from camopd_jax.config.schema import Judge
from camopd_jax.errors import UserError
from camopd_jax.evals.graders.width import to_ascii
from camopd_jax.evals.task import Grade, Row, Task

KEY = "OPENAI_API_KEY"
ATTEMPTS = 3

_RUBRICS = {
    "roleplay": (
        "You judge role-play. Below are a conversation and the reply of the character whose turn it is. Weigh: does "
        "the reply stay in character, with that character's voice, knowledge and feelings; does it follow from the "
        "conversation and move it on; is it well written, without repetition."
    ),
    "writing": (
        "You judge creative writing. Below are a request and the text written for it. Weigh: does the text do what was "
        "asked; is it original; is it well written and structured, without cliches and repetition."
    ),
}
_FORM = 'Give your reasons in a few sentences. End with "Score: N", N a whole number from 1 (useless) to 10 (masterly).'
_SCORE = re.compile(r"score\W*:\W*(10|[1-9])(?![\d.])", re.IGNORECASE)


def roleplay(config: Judge) -> Task:
    """The task `roleplay`, graded by the language model of `config`."""
    return _task("roleplay", config)


def writing(config: Judge) -> Task:
    """The task `writing`, graded by the language model of `config`."""
    return _task("writing", config)


def _task(kind: str, config: Judge) -> Task:
    def grade_kind(answer: str, row: Row) -> Grade:
        return grade(answer, row, kind=kind, config=config)

    grader = f"{config.model} at {config.endpoint}"
    return Task(grade_kind, needs=(), check_row=_check_row, threads=8, grader=grader, check=partial(check, config))


def _check_row(row: Row) -> None:
    if not row.keys() & {"messages", "prompt"}:
        raise UserError('no "messages" and no "prompt", which the judge reads')


def check(config: Judge) -> None:
    """Raises UserError if the endpoint, the model, the package openai or the key is missing."""
    if not config.endpoint or not config.model:
        raise UserError("config.evaluation.judge: tasks roleplay and writing need its endpoint and model")
    if importlib.util.find_spec("openai") is None:
        raise UserError("config.evaluation.judge: needs the package openai; pip install 'camopd_jax[eval]'")
    if not os.environ.get(KEY):
        raise UserError(f"config.evaluation.judge: set {KEY} in the environment (any text if no key is needed)")


def grade(answer: str, row: Row, *, kind: str, config: Judge) -> Grade:
    """The grade is (score - 1) / 9, for the language model's score from 1 to 10.

    Args:
      kind: of the rubric: "roleplay" or "writing".

    Raises:
      UserError: if the endpoint does not answer.
    """
    import openai

    client = openai.OpenAI(base_url=config.endpoint, api_key=os.environ[KEY], timeout=120, max_retries=4)
    question = f"{_RUBRICS[kind]}\n\n{_case(answer, row)}\n\n{_FORM}"
    for _ in range(ATTEMPTS):
        try:
            reply = client.chat.completions.create(
                model=config.model, messages=[{"role": "user", "content": question}], temperature=0
            )
        except openai.OpenAIError as error:
            raise UserError(
                f"config.evaluation.judge.endpoint: {config.endpoint} does not answer ({type(error).__name__}); "
                f"check the address, the model {config.model} and {KEY}. Answers are kept: start again to grade them"
            ) from error
        scores = _SCORE.findall(to_ascii(reply.choices[0].message.content or ""))
        if scores:
            return Grade((int(scores[-1]) - 1) / 9)
    return Grade(0.0, marked=False)


def _case(answer: str, row: Row) -> str:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    turns = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    return f"<conversation>\n{turns}\n</conversation>\n\n<reply>\n{answer}\n</reply>"
