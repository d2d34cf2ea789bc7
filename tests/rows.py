"""Rows of prompts for tests, and the JSON files that hold them."""

import json


def ask(text, *more):
    """A row whose conversation is one question, or alternates from there."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate([text, *more])]}


def read_lines(file):
    """The objects of a JSONL file, every line of it."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def edit_json(file, **changes):
    """Sets fields of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def swap_tokens(folder, first, second):
    """Gives two tokens of a folder's tokenizer each other's id."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))
