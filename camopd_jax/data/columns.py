"""Rows of well-known public datasets, recognised by their columns, as rows with "messages" and "answer".

Column names are those of the datasets on the Hugging Face hub, so that a local copy (JSONL or parquet) of one reads
the same. A question with options keeps them as "question" and "options" beside its messages, from which the recipes
build prompts of their own.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

LETTERS = "ABCDEFGHIJ"


def normalise(row: Row) -> Row:
    """The row with "messages", and "answer" where its dataset gives one; a row of an unknown dataset as it is."""
    if "messages" in row:
        return row
    for columns, convert in _DATASETS:
        if row.keys() >= set(columns) and (new := convert(row)) is not None:
            return row | new
    return row


def question_row(question: str, options: Sequence[str] = ()) -> Row:
    """A conversation of one question, with its options one to a line behind it.

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
    """Options come as one text, in lines like "A. Aspirin" or "Answer Choices:\\nA. Aspirin"; some rows have none."""
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
    """The grid as {"House 1": {"Name": ...}}; its public copy masks the answers, which are then left out."""
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


# The first entry whose columns a row has, and whose function takes the row, converts it.
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
