"""`generate` and `score` against transformers on torch, over every form of row."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rows import read_lines, write_lines

FOLDER = Path(__file__).parents[1] / "examples" / "quickstart" / "generalist"
ROWS = [
    {"messages": [{"role": "user", "content": "reverse abcd"}], "id": 7},
    {"prompt": "sort b"},
    {"prompt_ids": [3, 25, 20, 5, 4]},
    {"messages": [{"role": "user", "content": "double xyz"}, {"role": "assistant", "content": "no"}]},
]


@pytest.fixture(scope="module")
def torch_side():
    return (
        transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(),
        transformers.AutoTokenizer.from_pretrained(FOLDER),
    )


def prompt_ids(tokenizer, row):
    if "messages" in row:
        question = [m for m in row["messages"] if m["role"] == "user"]
        return tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    return row["prompt_ids"] if "prompt_ids" in row else tokenizer(row["prompt"])["input_ids"]


def torch_logprobs(model, prompt, response, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(response)), response].numpy()


def run(command, name, folder, rows, *flags):
    source, out = write_lines(folder / "x.jsonl", rows), folder / "y.jsonl"
    ended = command(name, f"--model={FOLDER}", f"--input={source}", f"--output={out}", "--batch_size=3", *flags)
    assert ended.code == 0, ended.err
    return read_lines(out)


def test_greedy_answers_are_those_of_transformers(command, tmp_path, torch_side):
    model, tokenizer = torch_side
    made = run(command, "generate", tmp_path, ROWS, "--max_new_tokens=12")
    for row, given in zip(made, ROWS, strict=True):
        assert {k: row[k] for k in given} == given, "the row comes back with the answer beside it"
        prompt = prompt_ids(tokenizer, given)
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert row["response_ids"] == theirs
        assert row["response"] == tokenizer.decode(theirs, skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if theirs[-1] == 5 else "length")
        np.testing.assert_allclose(row["logprobs"], torch_logprobs(model, prompt, theirs), atol=1e-4)


def test_sampled_answers_follow_the_seed_and_tell_unfiltered_logprobs(command, tmp_path, torch_side):
    model, tokenizer = torch_side
    rows = [{"prompt": "qx 7?"}] * 5
    flags = ["--max_new_tokens=8", "--temperature=3", "--top_k=20"]
    first, again, other = (run(command, "generate", tmp_path, rows, *flags, f"--seed={s}") for s in (1, 1, 2))
    assert first == again != other
    assert len({tuple(row["response_ids"]) for row in first}) > 1, "equal prompts have keys of their own"
    for row in first:
        expected = torch_logprobs(model, prompt_ids(tokenizer, row), row["response_ids"])
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_those_of_transformers(command, tmp_path, torch_side, temperature):
    model, tokenizer = torch_side
    answers = [
        {"response": "dcba"},
        {"response_ids": [11, 5]},
        {"response": "b a", "n": 1},
        {"response_ids": list(range(6, 30))},
    ]
    rows = [row | answer for row, answer in zip(ROWS, answers, strict=True)]
    made = run(command, "score", tmp_path, rows, f"--temperature={temperature}")
    for row, given in zip(made, rows, strict=True):
        assert {k: row[k] for k in given} == given
        ids = given.get("response_ids", tokenizer(given.get("response", ""), add_special_tokens=False)["input_ids"])
        assert row["response_ids"] == ids and len(row["logprobs"]) == len(ids)
        expected = torch_logprobs(model, prompt_ids(tokenizer, given), ids, temperature)
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, rows, says",
    [
        (
            "score",
            [{"prompt": "a", "response": "b"}, {"prompt": "a"}],
            'x.jsonl:2: no "response" and no "response_ids"',
        ),
        ("generate", [{"prompt": "a"}, {"text": "a"}], "x.jsonl:2: no prompt"),
    ],
)
def test_bad_rows_leave_no_output(command, tmp_path, name, rows, says):
    source, out = write_lines(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl"
    out.write_text("before")
    ended = command(name, f"--model={FOLDER}", f"--input={source}", f"--output={out}")
    assert ended.code == 2 and says in ended.err and len(ended.err.strip().splitlines()) == 1
    assert out.read_text() == "before"


def test_bad_flags(command, tmp_path):
    source = write_lines(tmp_path / "x.jsonl", ROWS)
    for flags, says in [
        ([f"--input={source}", f"--output={tmp_path / 'y'}"], "--model is missing"),
        ([f"--model={FOLDER}", f"--output={tmp_path / 'y'}"], "--input is missing"),
        ([f"--model={FOLDER}", f"--input={source}"], "--output is missing"),
        ([f"--model={FOLDER}", f"--input={source}", f"--output={tmp_path / 'no/y'}"], "cannot write"),
        ([f"--model={tmp_path}", f"--input={source}", f"--output={tmp_path / 'y'}"], "config.json is missing"),
        ([f"--model={FOLDER}", f"--input={source}", f"--output={tmp_path / 'y'}", "--top_p=2"], "top_p"),
    ]:
        ended = command("generate", *flags)
        assert ended.code == 2 and says in ended.err and len(ended.err.strip().splitlines()) == 1, ended.err
