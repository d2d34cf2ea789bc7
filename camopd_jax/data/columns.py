"""Converts rows of public datasets, recognised by their columns, to rows with "messages" and "answer".

The column names are those on the Hugging Face hub, so a local copy (JSONL or parquet) of a dataset works too. Questions
with options also have the fields "question" and "options", from which the recipes build their own prompts.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

LETTERS = "ABCDEFGHIJ"


def normalise(row: Row) -> Row:
    """Adds "messages", and "answer" if the dataset has one; a row of an unknown dataset is returned unchanged."""
    if "messages" in row:
        return row
    for columns, convert in _DATASETS:
        if row.keys() >= set(columns) and (new := convert(row)) is not None:
            return row | new
    return row


def question_row(question: str, options: Sequence[str] = ()) -> Row:
    """A conversation of one question, followed by its options, one per line.

    >>> question_row("Which metal?", ["Iron", "Zinc"])["messages"][0]["content"]
    'Which metal?\\n\\nA. Iron\\nB. Zinc'
    """
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    row: Row = {"messages": [{"role": "user", "content": question + ("\n" + lines if options else "")}]}
    return row | {"question": question, "options": list(options)} if options else row


def _medmcqa(row: Row) -> Row:
    right = row.get("cop", -1)
    answer = {"answer": LETTERS[right]} if isinstance(right, int) and 0 <= right < 4 else {}
    return question_row(row["question"], [row["opa"], row["opb"], row["opc"], row["opd"]]) | answer


def _medqa(row: Row) -> Row | None:
    options = row["options"]
    if not isinstance(options, dict):
        return None
    letters = sorted(options)
    return question_row(row["question"], [options[letter] for letter in letters]) | {
        "answer": LETTERS[letters.index(row["answer_idx"])],
        "answer_text": options[row["answer_idx"]],
    }


def _arc(row: Row) -> Row:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    answer = LETTERS[list(labels).index(row["answerKey"])]  # labels are letters, or 1 to 4
    return question_row(row["question"], texts) | {"answer": answer}


def _pubmedqa(row: Row) -> Row:
    contexts = row["context"]["contexts"] if isinstance(row["context"], dict) else [str(row["context"])]
    return question_row("\n".join([*contexts, row["question"]]), ["yes", "no", "maybe"]) | {
        "answer": row["final_decision"]
    }


def _medreason(row: Row) -> Row:
    """The options are one text with lines like "A. Aspirin" or "Answer Choices:\\nA. Aspirin"; some rows have none."""
    lines = re.findall(r"^\s*[A-J][.):]\s*(.+?)\s*$", str(row["options"]), re.MULTILINE)
    return question_row(row["question"], lines)


def _gsm8k(row: Row) -> Row | None:
    solution, mark, answer = str(row["answer"]).rpartition("####")
    return question_row(row["question"]) | {"answer": answer.strip(), "solution": solution.strip()} if mark else None


def _mbpp(row: Row) -> Row:
    text = row.get("text") or row["prompt"]
    tests = "\n".join(row["test_list"])
    return question_row(f"{text}\nYour code should pass these tests:\n{tests}")


def _zebra(row: Row) -> Row | None:
    """The answer is a grid, {"House 1": {"Name": ...}}; it is left out if masked, as in the public dataset."""
    grid = row["solution"]
    if not isinstance(grid, dict) or "header" not in grid:
        return None
    names = grid["header"][1:]
    solved = {f"House {house[0]}": dict(zip(names, house[1:], strict=True)) for house in grid["rows"]}
    form = {house: dict.fromkeys(names, "___") for house in solved}
    new = question_row(
        f"{row['puzzle']}\n\nSolve the puzzle. Reason step by step, then give the solution as JSON in exactly this "
        f"form:\n{json.dumps({'solution': form}, indent=1)}"
    )
    masked = any("___" in cell for house in solved.values() for cell in house.values())
    return new if masked else new | {"answer": solved}


def _sharegpt(row: Row) -> Row | None:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and t.get("from") in roles for t in turns):
        return None
    return {"messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]}


# A row is converted by the first entry whose columns it has and whose function does not return None.
_DATASETS: list[tuple[tuple[str, ...], Callable[[Row], Row | None]]] = [
    (("question", "opa", "opb", "opc", "opd"), _medmcqa),  # openlifescienceai/medmcqa
    (("question", "options", "answer_idx"), _medqa),  # GBaker/MedQA-USMLE-4-options
    (("question", "choices", "answerKey"), _arc),  # allenai/ai2_arc
    (("question", "context", "final_decision"), _pubmedqa),  # qiaojin/PubMedQA
    (("question", "options", "reasoning", "dataset_name"), _medreason),  # UCSC-VLAA/MedReason
    # FreedomIntelligence/Medical-R1-Distill-Data
    (("question", "response (content)"), lambda row: question_row(row["question"])),
    (("prompt", "distilled_answer_string"), lambda row: question_row(row["prompt"])),  # UCSC-VLAA/m23k-tokenized
    (("prompt", "instruction_id_list", "kwargs"), lambda row: question_row(row["prompt"])),  # google/IFEval
    (("task_id", "test_list"), _mbpp),  # google-research-datasets/mbpp
    (("puzzle", "solution", "size"), _zebra),  # allenai/ZebraLogicBench
    (("conversations",), _sharegpt),  # Neph0s/CoSER, and other datasets in ShareGPT's form
    (("question", "answer"), _gsm8k),  # openai/gsm8k
]
