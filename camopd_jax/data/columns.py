"""Converts rows of public datasets, recognised by their columns, to rows with "messages" and "answer".

Column names are those of the datasets on the Hugging Face hub, so that a local copy of one reads the same. A row that
has a form's columns but not its values is an error; one whose answer is kept back has no "answer". A question with
options keeps them as "question" and "options" beside its messages, from which the recipes build prompts of their own.
"""

import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from camopd_jax.data.messages import conversation
from camopd_jax.errors import UserError

Row = dict[str, Any]

LETTERS = string.ascii_uppercase


def normalise(row: Row) -> Row:
    """The row with "messages", and "answer" where its dataset gives one; a row of an unknown form as it is.

    Raises:
      UserError: naming the field of a row that has a known form's columns, but not its values.
    """
    if "messages" in row:
        return row | {"messages": conversation(row["messages"], "messages")}
    if isinstance(row.get("prompt"), list):
        return row | {"messages": conversation(row["prompt"], "prompt")}
    forms = _DATASETS if row.keys() & {"prompt", "prompt_ids"} else _DATASETS + _FORMS
    for columns, convert in forms:
        if row.keys() >= set(columns) and (new := convert(row)) is not None:
            return {name: value for name, value in (row | new).items() if value is not None or name not in new}
    return row


def question_row(question: str, options: Sequence[str] = ()) -> Row:
    """A conversation of one question, followed by its options, one per line.

    >>> question_row("Which metal?", ["Iron", "Zinc"])["messages"][0]["content"]
    'Which metal?\\n\\nA. Iron\\nB. Zinc'
    """
    row: Row = {"messages": [{"role": "user", "content": question + ("\n\n" + lettered(options) if options else "")}]}
    return row | {"question": question, "options": list(options)} if options else row


def lettered(options: Sequence[str], between: str = "\n") -> str:
    """Options as text, each behind its letter.

    Raises:
      UserError: if there are more of them than letters.
    """
    if len(options) > len(LETTERS):
        raise UserError(f"a question has {len(options)} options; it may have up to {len(LETTERS)}")
    return between.join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise UserError(f'"{name}" must be text, this is {row[name]!r:.80}')
    return row[name]


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f'"{name}" must be a list of texts, this is {value!r:.80}')
    return value


# ------------------------------------------------------------------------------- questions with options


def _right(row: Row, name: str, labels: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """The number of the option that a field names by its label, its text or its number from 0.

    None where a dataset keeps the answer back: there is no such field, or it is -1 or an empty text.
    """
    value = row.get(name)
    text = "" if value is None else str(value).strip()
    if text in ("", "-1"):
        return None
    if text.upper() in (folded := [label.upper() for label in labels]):
        return folded.index(text.upper())
    if isinstance(value, str) and text in texts:
        return texts.index(text)
    if text.isdecimal() and len(text) <= 2 and int(text) < len(labels):
        return int(text)
    raise UserError(f'"{name}" is {value!r:.80}, which names none of the {len(labels)} options')


def _answered(row: Row, texts: Sequence[str], right: int | None) -> Row:
    """A question with its options; "answer" is the letter of the right one, or null."""
    if right is None:
        return question_row(_text(row, "question"), texts) | {"answer": None}
    return question_row(_text(row, "question"), texts) | {"answer": LETTERS[right], "answer_text": texts[right]}


def _medmcqa(row: Row) -> Row:
    texts = [_text(row, name) for name in ("opa", "opb", "opc", "opd")]
    return _answered(row, texts, _right(row, "cop", LETTERS[:4]))


def _choice(row: Row) -> Row | None:
    """Options as a list of texts, as {letter: text}, or as ARC's {"label": [...], "text": [...]}."""
    name = "options" if "options" in row else "choices"
    number = next((key for key in ("answer_idx", "answerKey") if key in row), None)
    if number is None and (isinstance(row[name], str) or row.keys() & _PASSAGES):
        return None
    labels, texts = _options(row[name], name)
    right = _right(row, number, labels) if number else None
    return _answered(row, texts, _right(row, "answer", labels, texts) if right is None else right)


def _options(value: Any, name: str) -> tuple[list[str], list[str]]:
    """The label and the text of each option."""
    if isinstance(value, dict) and value.keys() == {"label", "text"}:
        labels, texts = _texts(value["label"], name), _texts(value["text"], name)
    elif isinstance(value, dict):
        kept = {label: text for label, text in sorted(value.items()) if text is not None}  # parquet's empty cells
        labels, texts = list(kept), _texts(list(kept.values()), name)
    else:
        texts = _texts(value, name)
        labels = list(LETTERS[: len(texts)])
    if not texts or (isinstance(value, dict) and len(labels) != len(texts)):
        raise UserError(f'"{name}" must give every option a label and a text, this is {value!r:.80}')
    return labels, texts


_WORDS = ["yes", "no", "maybe"]


def _pubmedqa(row: Row) -> Row | None:
    context, right = row["context"], row.get("final_decision")
    right = None if right == "" else right
    if isinstance(context, dict) and "contexts" in context:
        context = "\n".join(_texts(context["contexts"], "context"))
    elif right is None:
        return None
    elif not isinstance(context, str):
        raise UserError(f'"context" must be text or hold a list "contexts", this is {context!r:.80}')
    if right is not None and right not in _WORDS:
        raise UserError(f'"final_decision" is {right!r:.80}; it must be one of {", ".join(_WORDS)}')
    return question_row(f"{context}\n{_text(row, 'question')}", _WORDS) | {"answer": right}


def _medreason(row: Row) -> Row:
    """Options come as one text, in lines like "A. Aspirin" or "Answer Choices:\\nA. Aspirin"; some rows have none."""
    if not isinstance(row["options"], str):
        raise UserError(f'"options" must be text, this is {row["options"]!r:.80}')
    lines = re.findall(r"^\s*[A-Z][.):]\s*(.+?)\s*$", row["options"], re.MULTILINE)
    return question_row(_text(row, "question"), lines)


# --------------------------------------------------------------------------------------- other questions


def _only(name: str) -> Callable[[Row], Row]:
    """Converts a row whose prompt is one field."""
    return lambda row: question_row(_text(row, name))


def _gsm8k(row: Row) -> Row | None:
    solution, mark, answer = str(row["answer"]).rpartition("####")
    if not mark:
        return None
    return question_row(_text(row, "question")) | {"answer": answer.strip(), "solution": solution.strip()}


def _mbpp(row: Row) -> Row:
    text = _text(row, "text" if "text" in row else "prompt")
    tests = "\n".join(_texts(row["test_list"], "test_list"))
    return question_row(f"{text}\nYour code should pass these tests:\n{tests}")


def _zebra(row: Row) -> Row:
    """The grid as {"House 1": {"Name": ...}}; its public copy masks the answers, which are then left out."""
    names, houses = _grid(row["solution"])
    solved = {f"House {house[0]}": dict(zip(names, house[1:], strict=True)) for house in houses}
    form = {house: dict.fromkeys(names, "___") for house in solved}
    new = question_row(
        f"{_text(row, 'puzzle')}\n\nSolve the puzzle. Reason step by step, then give the solution as JSON in exactly "
        f"this form:\n{json.dumps({'solution': form}, indent=1)}"
    )
    masked = any("___" in cell for house in solved.values() for cell in house.values())
    return new if masked else new | {"answer": solved}


def _grid(value: Any) -> tuple[list[str], list[list[str]]]:
    """The names of a grid's columns but the first, and its rows."""
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list) or not value["rows"]:
        raise UserError(f'"solution" must have a "header" and "rows", this is {value!r:.80}')
    header = _texts(value.get("header"), "solution")
    houses = [_texts(house, "solution") for house in value["rows"]]
    if len(header) < 2 or any(len(house) != len(header) for house in houses):
        raise UserError(f'"solution": every row must have the {len(header)} cells of its header, two or more')
    return header[1:], houses


def _turns(name: str) -> Callable[[Row], Row | None]:
    """Converts a row whose conversation is in this field."""
    return lambda row: {"messages": conversation(row[name], name)} if isinstance(row[name], list) else None


def _question(row: Row) -> Row | None:
    """A question and its answer in words, unless the question may need another column."""
    alone = not row.keys() & _PASSAGES and not any(isinstance(value, list | dict) for value in row.values())
    return question_row(_text(row, "question")) if alone and isinstance(row["answer"], str) else None


# Columns with a text that a question is about: without it, it would be another question
_PASSAGES = {"article", "context", "document", "passage", "story"}

_Forms = list[tuple[tuple[str, ...], Callable[[Row], Row | None]]]

# The first entry whose columns a row has, and whose function takes the row, converts it.
_DATASETS: _Forms = [
    (("question", "opa", "opb", "opc", "opd"), _medmcqa),  # openlifescienceai/medmcqa
    (("question", "options", "answer_idx"), _choice),  # GBaker/MedQA-USMLE-4-options
    (("question", "choices", "answerKey"), _choice),  # allenai/ai2_arc
    (("question", "context"), _pubmedqa),  # qiaojin/PubMedQA
    (("question", "options", "reasoning", "dataset_name"), _medreason),  # UCSC-VLAA/MedReason
    (("question", "response (content)"), _only("question")),  # FreedomIntelligence/Medical-R1-Distill-Data
    (("prompt", "distilled_answer_string"), _only("prompt")),  # UCSC-VLAA/m23k-tokenized
    (("prompt", "instruction_id_list", "kwargs"), _only("prompt")),  # google/IFEval
    (("task_id", "test_list", "text"), _mbpp),  # google-research-datasets/mbpp
    (("task_id", "test_list", "prompt"), _mbpp),
    (("puzzle", "solution", "size"), _zebra),  # allenai/ZebraLogicBench
    (("conversations",), _turns("conversations")),  # Neph0s/CoSER, and other datasets in ShareGPT's form
    (("question", "answer"), _gsm8k),  # openai/gsm8k
]
# Further forms, of rows without a prompt of their own.
_FORMS: _Forms = [
    (("conversation",), _turns("conversation")),  # allenai/WildChat-1M
    (("question", "options"), _choice),
    (("question", "choices"), _choice),  # cais/mmlu
    (("question", "answer"), _question),
]
