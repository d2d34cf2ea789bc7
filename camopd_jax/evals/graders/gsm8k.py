"""GSM8K: compares the value of the number after an answer's last `Final answer:` or `####`, or in \\boxed{...}."""

import re
from fractions import Fraction

from camopd_jax.errors import UserError
from camopd_jax.evals.graders.width import to_ascii
from camopd_jax.evals.task import Grade, Row, Task

_MARKED = re.compile(r"final answer\W*?:\s*(.*)|####\s*(.*)", re.IGNORECASE)
_BOXED = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"-?\s*\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|(?<!\w)-?\s*\.\d+")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}")


def number(text: str) -> Fraction | None:
    r"""The value of the only number in a text with commas, units or LaTeX; None if there is none or more than one.

    >>> number(r"\$1,234.50 dollars")
    Fraction(2469, 2)
    >>> number(r"$\frac{3}{4}$ of a mile"), number("80 %"), number("3 or 4")
    (Fraction(3, 4), Fraction(80, 1), None)
    """
    text = _FRACTION.sub(r" \1/\2 ", to_ascii(text))
    text = re.sub(r"\\[,!;: ]|\{,\}", "", re.sub("[\u2212\u2013]", "-", text))
    text = re.sub(r"(?<=\d)[,_'\u2019\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)  # between thousands
    text = re.sub(r"(?<=-)[\s$\\\u00a3\u00a5\u20ac\u20b9\uffe5]+(?=\d)", "", text)  # between a minus and its number
    values = {_value(part) for part in _NUMBER.findall(text)}
    return values.pop() if len(values) == 1 else None


def _value(part: str) -> Fraction | None:
    try:
        return Fraction(re.sub(r"[\s,]", "", part))
    except (ValueError, ZeroDivisionError):
        return None


def final_number(answer: str) -> Fraction | None:
    """The number after an answer's last marker; None if there is no marker, or not exactly one number after it."""
    answer = to_ascii(answer)
    marks = [(m.start(), m[1] or m[2] or "") for m in _MARKED.finditer(answer)]
    marks += [(m.start(), m[1]) for m in _BOXED.finditer(answer)]
    for _, text in sorted(marks, reverse=True)[:1]:
        boxed = _BOXED.search(text)
        return number(boxed[1] if boxed else text)
    return None


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer's final number is the row's "answer", else 0."""
    value = final_number(answer)
    return Grade(float(value is not None and value == number(str(row["answer"]))), marked=value is not None)


def _check_row(row: Row) -> None:
    if number(str(row["answer"])) is None:
        raise UserError(f'"answer" is {row["answer"]!r:.80}; it must be one number')


TASK = Task(
    grade,
    'Please reason step by step. End with "Final answer: <number>".',
    check_row=_check_row,
    dataset="openai/gsm8k:main",
)
