"""The paper's prompt sets, from local files with the columns of the hub's datasets."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_rows import COSER, DISTILL, M23K, MEDMCQA, MEDREASON, NEMOTRON
from rows import chat_row, read_lines, write_lines

from camopd_jax.data import prompt_set, sources
from camopd_jax.data.prompt_set import Excluded
from camopd_jax.data.recipes import MEDICAL_SYSTEM, RECIPES, resized

CHOICE = "Please reason step by step and give the final answer choice at the end."
OPEN = (
    "Please reason step by step and answer clearly. Do not present the answer as a substitute for professional "
    "medical advice."
)


def many(row, field, n, start=0):
    return [row | {field: f"{row[field]} (number {i} of a long list of questions)"} for i in range(start, start + n)]


def conversations(lengths):
    def turns(i, n):
        return [{"from": ("human", "gpt")[t % 2], "value": f"{i}: turn {t}"} for t in range(n)]

    return [{"conversations": [COSER["conversations"][0], *turns(i, n)]} for i, n in enumerate(lengths)]


@pytest.fixture
def medical(tmp_path):
    """--source flags for small copies of the four medical datasets; one of them is parquet."""
    files = {
        "medmcqa": many(MEDMCQA, "question", 12),
        "medreason": many(MEDREASON, "question", 9, 100),
        "r1_distill": many(DISTILL, "question", 8),
        "m23k": many(M23K, "prompt", 5),
    }
    flags = []
    for name, rows in files.items():
        path = tmp_path / f"{name}.jsonl"
        write_lines(path, rows)
        if name == "medmcqa":
            path = tmp_path / "medmcqa.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        flags.append(f"--source={name}={path}")
    return flags


def build(command, name, out, *flags):
    ended = command("data.recipe", name, f"--out={out}", "--against=", *flags)
    assert ended.code == 0, ended.err
    return json.loads((Path(out) / "manifest.json").read_text()), ended.out


def test_recipes_have_the_papers_counts():
    counts = {name: {part.name: part.rows for part in made.parts} for name, made in RECIPES.items()}
    assert counts["medical"] == {"medmcqa": 4000, "medreason": 3000, "r1_distill": 2000, "m23k": 1000}
    assert counts["roleplay"] == {"coser": 10_000}
    assert counts["general"] == {"chat": 291, "code": 739, "math": 797, "stem": 8052, "tool_calling": 121}
    rows = (746_622, 1_896_395, 2_044_407, 20_662_167, 310_051)
    for count, of in zip(counts["general"].values(), rows, strict=True):
        assert count == round(10_000 * of / sum(rows))
    small = resized(RECIPES["general"], 100)
    assert [part.rows for part in small.parts] == [3, 7, 8, 81, 1]
    assert sum(part.rows for part in resized(RECIPES["medical"], 7).parts) == 7


def test_medical_prompts_have_the_papers_form(medical, command, tmp_path):
    manifest, out = build(command, "medical", tmp_path / "out", "--rows=20", *medical)
    rows = read_lines(tmp_path / "out/medical.jsonl")
    by_source = {}
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["system", "user"] and row["messages"][0][
            "content"
        ] == MEDICAL_SYSTEM
        by_source.setdefault(row["source"], []).append(row["messages"][1]["content"])
    assert {name: len(found) for name, found in by_source.items()} == {
        "medmcqa": 8,
        "medreason": 6,
        "r1_distill": 4,
        "m23k": 2,
    }
    for name in ("medmcqa", "medreason"):
        assert all(text.endswith(f"questions) A. Iron B. Zinc C. Lead D. Gold {CHOICE}") for text in by_source[name])
    assert all(text.startswith("Why?") and text.endswith(OPEN) for text in by_source["r1_distill"])
    assert all("A. Iron" in text for text in by_source["m23k"])
    first = manifest["parts"][0]
    assert (first["asked"], first["kept"], first["read"], first["dropped"]) == (8, 8, 12, {"not chosen": 4})
    digest = hashlib.sha256((tmp_path / "out/medical.jsonl").read_bytes()).hexdigest()
    assert manifest["files"] == {"medical.jsonl": digest} and manifest["seed"] == 0
    assert first["revision"].startswith("sha256:") and first["source"].endswith("medmcqa.parquet")
    assert "medmcqa: 8 of 12 rows" in out


def test_files_depend_only_on_the_seed(medical, command, tmp_path):
    files = {
        (seed, time): build(command, "medical", tmp_path / f"{seed}{time}", "--rows=20", f"--seed={seed}", *medical)[0][
            "files"
        ]
        for seed, time in ((0, "a"), (0, "b"), (1, "a"))
    }
    assert files[0, "a"] == files[0, "b"] != files[1, "a"]


def test_too_few_rows_are_reported(medical, command, tmp_path):
    manifest, out = build(command, "medical", tmp_path / "out", "--rows=100", *medical)
    assert [part["kept"] for part in manifest["parts"]] == [12, 9, 8, 5]
    assert "m23k: 5 of 5 rows, 5 fewer than asked" in out


def test_the_longest_conversations_are_prompts_and_the_rest_is_for_fine_tuning(command, tmp_path):
    source = write_lines(tmp_path / "coser.jsonl", conversations([4, 8, 2, 8, 6, 7]))
    build(command, "roleplay", tmp_path / "out", "--rows=3", f"--source=coser={source}")
    prompts = read_lines(tmp_path / "out/roleplay.jsonl")
    assert [row["id"] for row in prompts] == ["coser-1", "coser-3", "coser-4"], (
        "of 8, 8 and 6 turns; 7 ends on no reply"
    )
    assert [len(row["messages"]) for row in prompts] == [8, 8, 6], "the system prompt and all turns but the last"
    assert all(row["messages"][-1]["role"] == "user" for row in prompts)
    rest = read_lines(tmp_path / "out/roleplay_sft.jsonl")
    assert [row["id"] for row in rest] == ["coser-0", "coser-2"]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rest)


def test_general_prompts_end_with_a_request_and_have_a_licence(command, tmp_path):
    def nemotron(n, **changes):
        return [
            NEMOTRON | {"messages": [{"role": "user", "content": f"Why {i}?"}, *NEMOTRON["messages"][1:]]} | changes
            for i in range(n)
        ]

    tool = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None}]
    files = {
        "chat": nemotron(4),
        "code": nemotron(4),
        "math": nemotron(9, license="MIT"),
        "stem": nemotron(500),
        "tool_calling": [*nemotron(2), NEMOTRON | {"messages": tool}],
    }
    flags = [f"--source={name}={write_lines(tmp_path / f'{name}.jsonl', rows)}" for name, rows in files.items()]
    manifest, _ = build(command, "general", tmp_path / "out", "--rows=40", *flags)
    parts = {part["part"]: part for part in manifest["parts"]}
    assert parts["stem"]["read"] < 500, "the first rows are enough: a large dataset is never read whole"
    assert parts["code"]["dropped"]["a duplicate"] >= 1, "the same words in two parts are one prompt"
    assert all(row["messages"][-1]["role"] == "user" for row in read_lines(tmp_path / "out/general.jsonl"))
    assert parts["stem"]["licences"] == {"CC BY 4.0": parts["stem"]["kept"]}


def test_malformed_rows_of_a_dataset_are_counted_and_skipped():
    broken = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None}]
    rows = [
        ({"messages": broken}, "row 0"),
        (chat_row("Why?"), "row 1"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "row 2"),
    ]
    chosen = prompt_set.select_prompts(RECIPES["jsonl"].parts[0], rows, Excluded(set()), 0)
    assert chosen.dropped == {"malformed": 1, "no request": 1} and list(chosen.prompts) == [1]
    assert chosen.malformed.startswith('row 0: "messages": every message needs')


def test_the_first_malformed_row_is_named_and_tools_are_kept(command, tmp_path):
    tools, call = [{"type": "function", "function": {"name": "f"}}], [{"function": {"name": "f", "arguments": {}}}]
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": call, "timestamp": 7},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "user", "content": "And tomorrow?"},
    ]
    rows = [chat_row("Why?"), {"messages": []}, {"messages": turns, "tools": tools}]
    source = write_lines(tmp_path / "mine.jsonl", rows)
    manifest, out = build(command, "jsonl", tmp_path / "out", f"--source=rows={source}")
    _, with_tools = read_lines(tmp_path / "out" / "prompts.jsonl")
    assert with_tools["tools"] == tools
    assert with_tools["messages"][1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert with_tools["messages"][2] == turns[2]
    first = f'{source}:2: "messages" must be a list of at least one message'
    assert manifest["parts"][0]["first_malformed"] == first and f"malformed, first {first}" in out


def test_a_row_keeps_its_tools():
    rows = [(chat_row("Why?") | {"tools": [{"name": "weather"}]}, "row 0"), (chat_row("Who?"), "row 1")]
    chosen = prompt_set.select_prompts(RECIPES["jsonl"].parts[0], rows, Excluded(set()), 0)
    assert [prompt.get("tools") for prompt in chosen.prompts.values()] == [[{"name": "weather"}], None]


# --------------------------------------------------------------------------- evaluation questions

QUESTION = "A man of forty has a fever, and a cough that does not go. What is the cause?"


@pytest.mark.parametrize(
    "text, removed",
    [
        (QUESTION, True),
        (QUESTION.upper().replace(",", " -"), True),
        (QUESTION + "\n\nA. Flu\nB. Cold", True),
        (QUESTION + "\nA) Cold\nB) Flu", True),
        (QUESTION.replace("forty", "fifty"), False),
        ("Which is true?\n\nA. This\nB. That", False),
        ("Which is true?\n\nA. One\nB. Two", True),
        ("Which is true?", False),
    ],
)
def test_evaluation_questions_are_removed(text, removed, command, tmp_path):
    questions = [chat_row(QUESTION + "\n\nA. Cold\nB. Flu"), chat_row("Which is true?\n\nA. One\nB. Two")]
    excluded, _ = prompt_set.exclude([(str(write_lines(tmp_path / "e.jsonl", questions)), "test")])
    chosen = prompt_set.select_prompts(RECIPES["jsonl"].parts[0], [(chat_row(text), "row 0")], excluded, 0)
    assert chosen.dropped == ({"an evaluation question": 1} if removed else {})


def test_the_number_removed_is_in_the_manifest(command, tmp_path):
    source = write_lines(tmp_path / "mine.jsonl", [chat_row(f"{QUESTION} {i}") for i in range(10)])
    against = write_lines(tmp_path / "e.jsonl", [chat_row(f"{QUESTION} {i}") for i in range(3)])
    manifest, out = build(command, "jsonl", tmp_path / "out", f"--source=rows={source}", f"--against={against}")
    assert manifest["removed_as_evaluation"] == 3 and manifest["parts"][0]["kept"] == 7
    assert manifest["against"][0]["questions"] == 3 and "3 evaluation questions removed" in out


def test_by_default_questions_of_all_benchmarks_are_removed(command, tmp_path):
    source = write_lines(tmp_path / "m.jsonl", [chat_row("hi")])
    ended = command("data.recipe", "jsonl", f"--out={tmp_path / 'out'}", f"--source=rows={source}")
    assert ended.code == 2 and "--against: no dataset 'GBaker/MedQA-USMLE-4-options' on the hub" in ended.err


# --------------------------------------------------------------------------------------- the hub


def test_a_hub_dataset_is_read_at_the_revision_in_the_manifest(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "pinned", lambda name, field: (f"{name}@0a1b", "apache-2.0"))

    def load(name, split, field, streaming):
        calls.append((name, split, streaming))
        return many(MEDMCQA, "question", 6)

    monkeypatch.setattr(sources, "_load_dataset", load)
    made = resized(RECIPES["medical"], 8)
    made = dataclasses.replace(made, parts=made.parts[:1])
    manifest = prompt_set.build(made, "medical", tmp_path, [], 0)
    assert calls == [("openlifescienceai/medmcqa@0a1b", "train", True)]
    part = manifest["parts"][0]
    assert (part["source"], part["revision"], part["licence"]) == ("openlifescienceai/medmcqa", "0a1b", "apache-2.0")


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "NAME is missing"),
        (("medicine",), "medicine is not a recipe; give one of medical, roleplay, general, jsonl"),
        (("medical", "--source=medmcqa"), "--source=medmcqa: give PART=FILE, where PART is medmcqa or medreason"),
        (("medical", "--source=x=y.jsonl"), "--source=x=y.jsonl: give PART=FILE"),
        (("jsonl",), "--source is missing; give --source=rows=FILE.jsonl"),
        (("jsonl", "--source=rows=none.jsonl", "--against="), "--source=rows: cannot read none.jsonl"),
        (("jsonl", "more"), "'more' is not a flag"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, words, message):
    ended = command("data.recipe", *words, f"--out={tmp_path / 'out'}")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1 and message in ended.err
    assert not (tmp_path / "out").exists()


def test_out_is_required(command):
    ended = command("data.recipe", "medical")
    assert ended.code == 2 and "--out is missing; for example --out=data/medical" in ended.err


def test_rows_without_a_prompt_are_reported(command, tmp_path):
    source = write_lines(tmp_path / "x.jsonl", [{"text": "no prompt"}])
    ended = command("data.recipe", "jsonl", f"--out={tmp_path / 'out'}", f"--source=rows={source}", "--against=")
    assert ended.code == 2 and "no row of its sources contains a prompt" in ended.err
