"""Converts rows of public datasets, recognised by their columns, to rows with "messages" and "answer".

Column names are those of the datasets on the Hugging Face hub, so that a local copy of one reads the same. A row that
has a form's columns but not its values is an error; one whose answer is kept back has no "answer". A question with
options keeps them as "question" and "options" beside its messages, from which the recipes build prompts of their own.
"""

import ast
import contextlib
import itertools
import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from camopd_jax.data.messages import conversation, listed
from camopd_jax.errors import UserError

Row = dict[str, Any]

LETTERS = string.ascii_uppercase


def normalise(row: Row) -> Row:
    """The row with "messages", and "answer" where its dataset gives one; a row of an unknown form as it is.

    Raises:
      UserError: naming the field of a row that has a known form's columns, but not its values.
    """
    for name in _MEDIA & row.keys():
        if row[name]:
            raise UserError(
                f'"{name}" is not text, which is all that models here read; remove it if the text is enough'
            )
    new = _converted(row)
    if new is None:
        return row
    row = {name: value for name, value in (row | new).items() if value is not None or name not in new}
    return row | _beside(row)


def _converted(row: Row) -> Row | None:
    """The fields that a row of a known form gets."""
    if "messages" in row:
        return {"messages": conversation(row["messages"], "messages")}
    prompt, completion = listed(row.get("prompt")), listed(row.get("completion"))
    if isinstance(row.get("prompt"), list) or _are_turns(prompt):
        answered = _are_turns(completion) and len(completion) == 1 and completion[0].get("role") == "assistant"
        return {"messages": conversation(prompt + completion if answered else prompt, "prompt")}
    forms = _DATASETS if row.keys() & {"prompt", "prompt_ids"} else _DATASETS + _FORMS
    for columns, convert in forms:
        if row.keys() >= set(columns) and (new := convert(row)) is not None:
            return new
    return None


def _are_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)


def _beside(row: Row) -> Row:
    """What a converted row's other columns say about its conversation: system prompt, tools and answer."""
    new: Row = {}
    system = next((row[name] for name in ("system", "system_prompt") if _is_text(row.get(name))), None)
    if system and row["messages"][0]["role"] not in ("system", "developer"):
        new["messages"] = [{"role": "system", "content": system}, *row["messages"]]
    if "tools" not in row and isinstance(functions := listed(row.get("functions")), list) and functions:
        new["tools"] = [{"type": "function", "function": function} for function in functions]  # OpenAI's older form
    reward = row["reward_model"] if isinstance(row.get("reward_model"), dict) else {}  # verl's
    truths = [row.get("ground_truth"), row.get("expected_answer"), reward.get("ground_truth")]
    truth = next((value for value in truths if _is_text(value) or type(value) in (int, float)), None)
    return new if "answer" in row or truth is None else new | {"answer": truth}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


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
    value = _parsed(row[name], name)
    if number is None and (isinstance(value, str) or row.keys() & _PASSAGES):
        return None
    labels, texts = _options(value, name)
    right = _right(row, number, labels) if number else None
    return _answered(row, texts, _right(row, "answer", labels, texts) if right is None else right)


def _parsed(value: Any, name: str) -> Any:
    """The list or object of options that a cell of a table holds, as JSON or in Python's notation; else the value.

    Raises:
      UserError: for a text that begins like one, such as a printed array of numpy.
    """
    parsed = listed(value)
    if isinstance(parsed, str) and parsed.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = ast.literal_eval(parsed.strip())
        if not isinstance(parsed, list | dict) or len(parsed) < 2:  # Python joins texts without a comma between them
            raise UserError(f'"{name}" must be a list of options or its JSON text, this is {value!r:.80}')
    return parsed


def _lettered(row: Row) -> Row:
    """Options in the columns A, B and so on, up to the first that is missing or empty."""
    labels = [*itertools.takewhile(lambda letter: row.get(letter) not in (None, ""), LETTERS)]
    texts = [str(row[label]) for label in labels]
    return _answered(row, texts, _right(row, "answer", labels, texts))


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
    return lambda row: {"messages": conversation(row[name], name)} if isinstance(listed(row[name]), list) else None


def _chosen(row: Row) -> Row | None:
    """A preference whose prompt is in both conversations: the one that was preferred."""
    return {"messages": conversation(row["chosen"], "chosen")} if _are_turns(listed(row["chosen"])) else None


def _instruction(name: str, answer: str) -> Callable[[Row], Row | None]:
    """Converts Alpaca's rows and their relatives: an instruction, its input, earlier turns and the answer."""

    def convert(row: Row) -> Row | None:
        if any(row.get(passage) for passage in _PASSAGES) or any(map(_OPTION.fullmatch, row)):
            return None
        earlier = listed(row.get("history")) or []
        if not isinstance(earlier, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in earlier):
            raise UserError(f'"history" must be a list of pairs of a question and its answer, this is {earlier!r:.80}')
        added = f"\n{row['input']}" if _is_text(row.get("input")) else ""
        texts = [text for pair in earlier for text in pair] + [_text(row, name) + added]
        texts += [row[answer]] if _is_text(row[answer]) else []
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return {"messages": conversation(turns, "history")}

    return convert


def _question(row: Row) -> Row | None:
    """A question and its answer, a text or a number, unless the question may need another column."""
    alone = not row.keys() & _PASSAGES and not any(isinstance(value, list | dict) for value in row.values())
    alone = alone and not any(map(_OPTION.fullmatch, row))
    return question_row(_text(row, "question")) if alone and type(row["answer"]) in (str, int, float) else None


def _only_question(row: Row) -> Row | None:
    """A row whose only text is a question."""
    others = [value for name, value in row.items() if name not in ("question", "id", "source")]
    return question_row(_text(row, "question")) if all(type(value) in (int, float) for value in others) else None


# Columns with a text that a question is about: without it, it would be another question
_PASSAGES = {"article", "context", "document", "passage", "story"}
# Columns of one option each, in other forms than "A", "B", ...
_OPTION = re.compile(r"(option|choice|distractor|ending|opt|sol)[ _]?([a-j]|\d+)", re.IGNORECASE)
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}

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
    (("question", "A", "B"), _lettered),  # ceval/ceval-exam
    (("question", "answer"), _question),
    (("question", "response"), _instruction("question", "response")),  # Open-Orca/OpenOrca
    (("question",), _only_question),
    (("problem",), _only("problem")),  # AI-MO/NuminaMath-CoT
    (("instruction", "output"), _instruction("instruction", "output")),  # tatsu-lab/alpaca
    (("instruction", "response"), _instruction("instruction", "response")),  # databricks/databricks-dolly-15k
    (("query", "response"), _instruction("query", "response")),  # ms-swift
    (("chosen", "rejected"), _chosen),  # trl-lib/ultrafeedback_binarized
]
