"""What a file of prompts says about a run: lengths, answers that its rows give, and questions to hold out."""

import random
import re
from dataclasses import dataclass

import numpy as np

from camopd_jax.config.schema import Template
from camopd_jax.data import sources, templates
from camopd_jax.data.columns import Row
from camopd_jax.data.questions import question_keys
from camopd_jax.data.templates import Tokenizers

COVERED = 0.99  # share of the prompts, and of the answers, that a cap is to hold
HELD_OUT = 0.1  # share of the rows with an answer that become questions
MOST_QUESTIONS, FEWEST_QUESTIONS = 200, 10
SHORT_ANSWER = 16  # tokens; longer answers are hardly ever repeated exactly


@dataclass(frozen=True)
class Survey:
    """A file of prompts."""

    source: str
    rows: list[Row]  # the prompts to train on
    questions: list[Row]  # held out of them
    task: str  # that grades the questions; "": there are none
    lengths: np.ndarray  # int[rows], of the prompts in tokens
    answer_lengths: np.ndarray  # int[...], of the answers that rows give, in tokens; keys to a question are none

    def prompt_length(self, share: float = COVERED) -> int:
        """The length in tokens that this share of the prompts does not exceed."""
        return int(np.quantile(self.lengths, share, method="higher"))

    def answer_length(self) -> int | None:
        """The same for the answers; None: the rows give none."""
        return int(np.quantile(self.answer_lengths, COVERED, method="higher")) if len(self.answer_lengths) else None


def survey(source: str, flag: str, tokenizers: Tokenizers) -> Survey:
    """Reads and tokenises all rows, and holds questions out if enough of them give an answer.

    Raises:
      UserError: naming the flag, or file and line, as `sources.read`; and as `Reader.prompt`.
    """
    located = sources.read_located(source, field=flag)
    rows = [row for row, _ in located]
    readers = (tokenizers.student,) if tokenizers.read_alike else (tokenizers.student, tokenizers.teacher)
    read = [reader.prompts(located, Template()) for reader in readers]
    lengths = [max(map(len, of_row)) for of_row in zip(*read, strict=True)]
    answers = [given_answer(row) for row in rows]
    of_answers = [len(templates.tokens(tokenizers.student.tokenizer, text)) + 1 for text in answers if text]  # and EOS
    task = find_task([row for row, text in zip(rows, answers, strict=True) if text], of_answers)
    kept, questions = hold_out(rows, [i for i, text in enumerate(answers) if text] if task else [])
    is_key = task in ("choice", "gsm8k")
    return Survey(
        source=source,
        rows=[rows[i] for i in kept],
        questions=[rows[i] for i in questions],
        task=task if questions else "",
        lengths=np.asarray([lengths[i] for i in kept]),
        answer_lengths=np.asarray([] if is_key else of_answers, int),
    )


def given_answer(row: Row) -> str:
    """The answer that a row gives: its last assistant turn, else "response" or "answer"; "": none."""
    turns = row.get("messages") or [{"role": "user"}]
    own = turns[-1].get("content") if turns[-1]["role"] == "assistant" else None
    texts = (own, row.get("response"), row.get("answer"))
    return next((str(text).strip() for text in texts if isinstance(text, str | int | float) and str(text).strip()), "")


def find_task(rows: list[Row], lengths: list[int]) -> str:
    """The task that can grade all of these rows, which give answers; "": none can.

    Args:
      lengths: of the answers, in tokens.
    """
    keys = [str(row.get("answer", "")).strip() for row in rows]
    if rows and all(keys) and not any("response" in row or _answered(row) for row in rows):
        if all(re.fullmatch("[A-Za-z]", key) for key in keys):
            return "choice"
        if all(re.fullmatch(r"[-+]?\d[\d,]*(\.\d+)?", key) for key in keys):
            return "gsm8k"
        if np.quantile(lengths, COVERED) <= SHORT_ANSWER:
            return "exact"
    return "likelihood" if rows and all("messages" in row for row in rows) else ""


def _answered(row: Row) -> bool:
    return bool(row.get("messages")) and row["messages"][-1]["role"] == "assistant"


def answer_pattern(rows: list[Row]) -> str:
    """The `answer` of a benchmark with task likelihood; rows with an assistant turn at the end do not use it."""
    return "{response}" if all("response" in row for row in rows) else "{answer}"


def hold_out(rows: list[Row], answered: list[int]) -> tuple[list[int], list[int]]:
    """Row numbers of the prompts to train on and of the questions; a question is not among the prompts.

    Args:
      answered: numbers of the rows that give an answer.
    """
    count = min(MOST_QUESTIONS, int(HELD_OUT * len(answered)))
    if count < FEWEST_QUESTIONS:
        return list(range(len(rows))), []
    questions = sorted(random.Random(0).sample(answered, count))
    known = set().union(*(question_keys(rows[i]) for i in questions)) - {""}
    chosen = set(questions)
    return [i for i, row in enumerate(rows) if i not in chosen and known.isdisjoint(question_keys(row))], questions
