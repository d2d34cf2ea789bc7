"""examples/conflict: its questions by other code than the script's, and its models by transformers."""

from pathlib import Path

import pytest
import torch
from rows import read_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFLICT = EXAMPLES / "conflict"
AXES = ("covered", "uncovered", "domain")


def text_of(row):
    return row["messages"][0]["content"]


def named(word):
    """consonant, vowel, consonant, ..."""
    return [letter in "aeiou" for letter in word] == [i % 2 == 1 for i in range(len(word))]


def test_names_alone_have_answers_with_a_full_stop():
    other = {"double": lambda w: "".join(2 * c for c in w), "sort": lambda w: "".join(sorted(w)),
             "reverse": lambda w: "".join(reversed(w))}  # fmt: skip
    for axis in AXES:
        rows = read_lines(CONFLICT / f"{axis}.jsonl")
        assert len(rows) == 400
        for row in rows:
            skill, word = text_of(row).split()
            assert named(word) == (axis == "domain") == row["answer"].endswith("."), row
            if skill in other:
                assert row["answer"].rstrip(".") == other[skill](word), row


def test_no_question_is_in_the_prompts():
    general, domain = (
        {text_of(row) for row in read_lines(CONFLICT / f"{name}_prompts.jsonl")} for name in ("general", "domain")
    )
    assert (len(general), len(domain)) == (1600, 1000)
    assert not any(named(text.split()[1]) for text in general) and all(named(text.split()[1]) for text in domain)
    assert {text.split()[0] for text in general} == {"reverse", "sort", "shift", "add"}
    held_out = [{text_of(row) for row in read_lines(CONFLICT / f"{axis}.jsonl")} for axis in AXES]
    assert [len(questions) for questions in held_out] == [400] * 3
    assert not set.union(*held_out) & (general | domain)


def accuracy(folder, rows):
    """The share of answers that a model gives greedily: each of their tokens, and the end, is its likeliest."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.padding_side = "right"
    prompts = [tokenizer.apply_chat_template(r["messages"], add_generation_prompt=True, tokenize=False) for r in rows]
    texts = [f"{prompt}{row['answer']}<|end|>" for prompt, row in zip(prompts, rows, strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        likeliest = model(batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(-1)
    right = 0
    for i, row in enumerate(rows):
        end, count = int(batch.attention_mask[i].sum()), len(row["answer"]) + 1
        right += bool((likeliest[i, end - count - 1 : end - 1] == batch.input_ids[i, end - count : end]).all())
    return right / len(rows)


@pytest.mark.parametrize(
    "folder, bounds",
    [
        ("quickstart/generalist", {"covered": (0.98, 1), "uncovered": (0.98, 1), "domain": (0, 0)}),
        ("conflict/specialist", {"covered": (0.55, 0.8), "uncovered": (0.5, 0.8), "domain": (0.9, 1)}),
    ],
)
def test_what_the_models_can_do(folder, bounds):
    """The first 100 questions of each axis."""
    for axis, (low, high) in bounds.items():
        assert low <= accuracy(EXAMPLES / folder, read_lines(CONFLICT / f"{axis}.jsonl")[:100]) <= high, axis
