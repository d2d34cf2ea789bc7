"""`generate` and `score` against transformers on torch, for every form of row."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers
from quickstart import QUICKSTART
from rows import read_lines, write_lines

from camopd_jax.config.build import from_flags
from camopd_jax.config.schema import Sampling
from camopd_jax.errors import UserError
from camopd_jax.inference.files import FileJob, answer_file

FOLDER = QUICKSTART / "generalist"
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
    assert ended.out.splitlines()[-1] == f"written: {out}"
    return read_lines(out)


def test_greedy_answers_equal_transformers(command, tmp_path, torch_side):
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


def test_sampled_answers_depend_on_the_seed_and_have_unfiltered_logprobs(command, tmp_path, torch_side):
    model, tokenizer = torch_side
    rows = [{"prompt": "qx 7?"}] * 5
    flags = ["--max_new_tokens=8", "--temperature=3", "--top_k=20"]
    first, again, other = (run(command, "generate", tmp_path, rows, *flags, f"--seed={s}") for s in (1, 1, 2))
    assert first == again != other
    assert len({tuple(row["response_ids"]) for row in first}) > 1, "equal prompts have keys of their own"
    for row in first:
        expected = torch_logprobs(model, prompt_ids(tokenizer, row), row["response_ids"])
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)


def test_several_answers_to_each_row(command, tmp_path):
    """Each row comes once for every answer, with its number; answer 0 is the only one of a run without the flag."""
    flags = ["--max_new_tokens=8", "--temperature=3", "--top_k=20"]
    alone = run(command, "generate", tmp_path, ROWS[:3], *flags)
    made = run(command, "generate", tmp_path, ROWS[:3], *flags, "--answers_per_prompt=2")
    assert [row.pop("answer") for row in made] == [0, 1] * 3
    assert made[::2] == alone
    assert [row["response_ids"] for row in made[1::2]] != [row["response_ids"] for row in alone]
    source, out = write_lines(tmp_path / "x.jsonl", ROWS), tmp_path / "z.jsonl"
    ended = command("generate", f"--model={FOLDER}", f"--input={source}", f"--output={out}", "--answers_per_prompt=2")
    assert ended.code == 2 and not out.exists()
    assert "--answers_per_prompt is 2, but greedy answers are all the same; give --temperature" in ended.err


def test_rows_in_other_forms_are_answered_alike(command, tmp_path):
    """Characters that some take for the end of a line, a JSON array, a table: as the same prompts in JSON lines."""
    rows = [{"prompt": f"a{c}b{c}c", "note": c} for c in "\u2028\u2029\x85\x0b\x0c\x1c"]
    said = [row["response_ids"] for row in run(command, "generate", tmp_path, rows, "--max_new_tokens=2")]
    assert [{k: row[k] for k in ("prompt", "note")} for row in read_lines(tmp_path / "y.jsonl")] == rows
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "note"), *(row.values() for row in rows)])
    for name in ("array.json", "table.csv"):
        flags = [f"--input={tmp_path / name}", f"--output={tmp_path / 'z.jsonl'}", "--max_new_tokens=2"]
        ended = command("generate", f"--model={FOLDER}", *flags)
        assert ended.code == 0 and ended.err == ""
        assert [row["response_ids"] for row in read_lines(tmp_path / "z.jsonl")] == said, name


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_equal_transformers(command, tmp_path, torch_side, temperature):
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
    "name, rows, message",
    [
        (
            "score",
            [{"prompt": "a", "response": "b"}, {"prompt": "a"}],
            'x.jsonl:2: no "response" and no "response_ids"',
        ),
        ("generate", [{"prompt": "a"}, {"text": "a"}], "x.jsonl:2: no prompt"),
        ("generate", [{"prompt": "a"}, {"prompt_ids": [3, 52]}], "x.jsonl:2: token None (id 52) is beyond the 52 rows"),
        ("score", [{"prompt": "a", "response_ids": [99]}], "x.jsonl:1: token None (id 99) is beyond the 52 rows"),
        ("score", [{"prompt_ids": [99], "response": "a"}], "x.jsonl:1: token None (id 99) is beyond the 52 rows"),
        (
            "generate",
            [{"prompt": "a"}, {"prompt": "a", "note": "\ud83d"}],
            "x.jsonl:2: '\\ud83d' is half of a surrogate",
        ),
    ],
)
def test_bad_rows_leave_no_output(command, tmp_path, name, rows, message):
    source, out = write_lines(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl"
    out.write_text("before")
    ended = command(name, f"--model={FOLDER}", f"--input={source}", f"--output={out}")
    assert ended.code == 2 and message in ended.err and len(ended.err.strip().splitlines()) == 1
    assert out.read_text() == "before"


def test_bad_flags(command, tmp_path):
    source = write_lines(tmp_path / "x.jsonl", ROWS)
    for flags, message in [
        ([f"--input={source}", f"--output={tmp_path / 'y'}"], "--model is missing"),
        ([f"--model={FOLDER}", f"--output={tmp_path / 'y'}"], "--input is missing"),
        ([f"--model={FOLDER}", f"--input={source}"], "--output is missing"),
        ([f"--model={FOLDER}", f"--input={source}", f"--output={tmp_path / 'no/y'}"], "cannot write"),
        ([f"--model={tmp_path}", f"--input={source}", f"--output={tmp_path / 'y'}"], "config.json is missing"),
        ([f"--model={FOLDER}", f"--input={source}", f"--output={tmp_path / 'y'}", "--top_p=2"], "top_p"),
    ]:
        ended = command("generate", *flags)
        assert ended.code == 2 and message in ended.err and len(ended.err.strip().splitlines()) == 1, ended.err


def test_outputs_that_would_be_lost_or_could_not_be_written(tmp_path):
    """Found before the model is loaded, of which there is none here."""
    source = write_lines(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "link.jsonl").symlink_to(source)
    for output, message in [
        (source, "x.jsonl is the input, which would be lost; give another file"),
        (tmp_path / "link.jsonl", "link.jsonl is the input, which would be lost"),
        (tmp_path, "is a folder; give a file"),
        (tmp_path / "no" / "y.jsonl", "there is no folder"),
        (source / "y.jsonl", "there is no folder"),
    ]:
        job = FileJob("none", str(source), str(output), None, 4, "auto")
        with pytest.raises(UserError, match=f"^--output: .*{message}"):
            answer_file(job, Sampling(), max_new_tokens=2, seed=0)
    assert len(source.read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"min_p": 1.0}, "--min_p is 1.0; give a number >= 0 and < 1 (0: off)"),
        ({"top_p": 0.0}, "--top_p is 0.0; give a number > 0 and <= 1 (1: off)"),
        ({"temperature": float("nan")}, "--temperature is nan; give a finite number"),
    ],
)
def test_sampling_flags_have_the_limits_of_the_config(values, message):
    with pytest.raises(UserError) as error:
        from_flags(Sampling, **values)
    assert str(error.value) == message
    assert from_flags(Sampling, temperature=0.5, top_k=3) == Sampling(temperature=0.5, top_k=3)
