"""Multiple choice: grades the letter after `Final answer:`. MedQA-USMLE, MedMCQA, ARC, PubMedQA.

MedQA is graded as in the CaMOPD paper (Appendix B): the answer must end with "Final answer: <letter>", exact match. An
answer without this marker is wrong, even if it is clear, and counts as unmarked.
"""

import re
from dataclasses import replace

from camopd_jax.errors import UserError
from camopd_jax.evals.graders.width import to_ascii
from camopd_jax.evals.task import Grade, Row, Task

# Accepted as one letter: "(B)", "<B>", "**B**", "B."; not accepted: "A or B", "Because", "B12", "I'm".
_MARKER = re.compile(r"final answer\W*?:\s*(.*)", re.IGNORECASE)
_EMPHASIS = re.compile(r"<(b|i|u|em|strong)>(.*?)</\1>", re.IGNORECASE)  # its tags are no letters in brackets
_ORNAMENT = r"[\s*_`$()\[\]{}<>\"'\u2018\u2019\u201c\u201d]*"
_END = r"(?!\w|['\u2019>]\w)"
_LETTER = re.compile(rf"(?:{_ORNAMENT}(?:\\[a-z]+(?={{)|option|choice))*{_ORNAMENT}([a-z]){_END}(.*)", re.IGNORECASE)
_SECOND = re.compile(
    rf"{_ORNAMENT}(?:(?:[,;/|&+]|\b(?:or|and|maybe|perhaps|possibly)\b)\s*)+{_ORNAMENT}[a-z]{_END}", re.IGNORECASE
)


def final_answer(answer: str) -> str | None:
    """The text after the last `Final answer:`; None if there is none or if more lines follow it."""
    answer = to_ascii(answer)
    last = max(_MARKER.finditer(answer), key=re.Match.start, default=None)
    if last is None or answer[last.end() :].strip("*_`$ \n"):
        return None
    return last[1].strip()


def letter(answer: str) -> str | None:
    r"""The letter of an answer's final answer, in upper case; None if there is none or more than one.

    >>> letter("A looks right at first. **Final answer: (B)**")
    'B'
    >>> letter(r"Final answer: $\boxed{C}$. Ceftriaxone")
    'C'
    >>> letter("Final answer: A or B") is letter("The answer is B") is letter("Final answer: Because") is None
    True
    """
    match = _LETTER.fullmatch(_EMPHASIS.sub(r"\2", final_answer(answer) or ""))
    if match is None or _SECOND.match(match[2]):
        return None
    return match[1].upper()


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer's letter is the row's "answer", else 0."""
    chosen = letter(answer)
    return Grade(float(chosen == str(row["answer"]).strip().upper()), marked=chosen is not None)


_WORDS = ("yes", "no", "maybe")


def grade_pubmedqa(answer: str, row: Row) -> Grade:
    """PubMedQA: yes, no or maybe, given as word or as letter."""
    rest = (final_answer(answer) or "").lower()
    words = {word for word in re.findall(r"[a-z]+", rest) if word in _WORDS}
    chosen = letter(answer)
    if chosen is None and len(words) == 1:
        chosen = "ABC"[_WORDS.index(words.pop())]
    right = str(row["answer"]).strip()
    right = "ABC"[_WORDS.index(right.lower())] if right.lower() in _WORDS else right.upper()
    return Grade(float(chosen == right), marked=chosen is not None)


def _check_row(row: Row) -> None:
    if not re.fullmatch("[A-Za-z]", str(row["answer"]).strip()):
        raise UserError(f'"answer" is {row["answer"]!r:.80}; it must be the letter of an option')


def _check_pubmedqa(row: Row) -> None:
    if str(row["answer"]).strip().lower() not in (*_WORDS, "a", "b", "c"):
        raise UserError(f'"answer" is {row["answer"]!r:.80}; it must be one of {", ".join(_WORDS)}')


_INSTRUCTION = 'Please reason step by step. End with "Final answer: <letter>".'

CHOICE = Task(grade, check_row=_check_row)
MEDQA = replace(CHOICE, instruction=_INSTRUCTION, dataset="GBaker/MedQA-USMLE-4-options")
MEDMCQA = replace(MEDQA, dataset="openlifescienceai/medmcqa", split="validation")
ARC = replace(MEDQA, dataset="allenai/ai2_arc:ARC-Challenge")
PUBMEDQA = Task(
    grade_pubmedqa, _INSTRUCTION, check_row=_check_pubmedqa, dataset="qiaojin/PubMedQA:pqa_labeled", split="train"
)
