"""Rows of prompts for tests, and functions for JSON files."""

import json


def chat_row(text, *more):
    """A row with a conversation of one question, or of alternating turns that start with it."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate([text, *more])]}


def read_lines(file):
    """The objects of a JSONL file, every line of it."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def edit_json(file, **changes):
    """Sets fields of a JSON file; None removes a field."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def swap_tokens(folder, first, second):
    """Swaps the ids of two tokens of a folder's tokenizer."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))


def add_tokens(folder, *tokens, special=True):
    """Adds tokens behind the others of a folder's tokenizer."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    size = 1 + max(tokenizer["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    tokenizer["added_tokens"] += [{"id": size + i, "content": token} | flags for i, token in enumerate(tokens)]
    file.write_text(json.dumps(tokenizer))
