"""Rows from files, and errors that name the line of a malformed row."""

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from camopd_jax.data.sources import read, read_file
from camopd_jax.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "hi"}], "answer": "A"}


def test_reads_all_kinds_of_prompts_and_keeps_other_fields(write):
    rows = [GOOD, {"prompt": "text", "n": 3}, {"prompt_ids": [1, 2], "response_ids": []}]
    path = write([rows[0], "", rows[1], rows[2]], "rows.txt")
    assert read_file(path, "--input") == [(rows[0], f"{path}:1"), (rows[1], f"{path}:3"), (rows[2], f"{path}:4")]


def test_several_files_and_a_limit(write, tmp_path):
    both = write([GOOD, GOOD], "a.jsonl") + ", " + write([{"prompt": "b"}], "b.jsonl")
    assert read(both) == [GOOD, GOOD, {"prompt": "b"}]
    assert read(both, limit=1) == [GOOD]


def test_parquet_rows_without_the_nulls_of_other_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "B"}]), path
    )
    assert read(str(path)) == [{"prompt": "a"}, {"prompt": "b", "answer": "B"}]


def test_a_dataset_by_name(monkeypatch):
    made = datasets.Dataset.from_list([GOOD, GOOD, GOOD])
    calls = []

    def load_dataset(*name, split, streaming, **revision):
        calls.append((*name, split, streaming, revision))
        return made.to_iterable_dataset() if streaming else made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name", "test") == [GOOD] * 3
    assert read("owner/name:part@0a1b", "test", limit=2) == [GOOD] * 2
    assert calls == [
        ("owner/name", None, "test", False, {}),
        ("owner/name", "part", "test", True, {"revision": "0a1b"}),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, this is list"),
        ('{"messages": []}', '"messages" must be a list of at least one'),
        ('{"messages": ["hi"]}', 'needs a text "role" and a text "content", this is \'hi\''),
        ('{"messages": [{"role": "user"}]}', 'needs a text "role" and a text "content"'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'needs a text "role" and a text "content"'),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a part of type 'image_url'"),
        ('{"messages": [{"role": "user", "content": ["hi"]}]}', "a part of type 'str'"),
        ('{"conversations": [{"from": "narrator", "value": "x"}]}', "a turn is \"from\" 'narrator'"),
        ('{"prompt": [{"role": "user"}]}', '"prompt": every message needs'),
        ('{"text": "x", "id": 1}', 'give "messages", "prompt" or "prompt_ids" (the row has the fields text, id)'),
        ("{}", "(the row has the fields none)"),
        ('{"prompt": ""}', "no prompt"),
        ('{"prompt": 7, "prompt_ids": [1]}', '"prompt" must be text'),
        ('{"prompt_ids": [true]}', '"prompt_ids" must be a list of token ids'),
        ('{"prompt_ids": [2147483648]}', '"prompt_ids" must be a list of token ids'),
        ('{"prompt": "half \\ud83d smile"}', "'\\ud83d' is half of a surrogate pair"),
        ('{"prompt": "a", "note": [{"\\udc00": 1}]}', "'\\udc00' is half of a surrogate pair"),
        ('{"prompt": "a", "x": ' + "[" * 100 + "]" * 100 + "}", "nested more than 100 deep"),
        ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"prompt": "a", "id": ' + "1" * 5000 + "}", "a whole number has too many digits"),
        ('{"prompt_ids": []}', "at least one token"),
        ('{"prompt_ids": ["a"]}', '"prompt_ids" must be a list of token ids'),
        ('{"prompt": "a", "response_ids": [-1]}', '"response_ids" must be a list of token ids'),
        ('{"prompt": "a", "response": 3}', '"response" must be text'),
    ],
)
def test_the_error_for_a_malformed_row_names_file_and_line(write, row, message):
    path = write([GOOD, "", row])
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_missing_and_empty_files(tmp_path, write):
    with pytest.raises(UserError, match=r"config\.branches\.recovery\.prompts\.source: no file .*none\.jsonl"):
        read(str(tmp_path / "none.jsonl"), field="config.branches.recovery.prompts.source")
    with pytest.raises(UserError, match="no rows"):
        read(write([""]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:1: not UTF-8"):
        read(str(tmp_path / "latin.jsonl"))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match="not a parquet file"):
        read(str(tmp_path / "bad.parquet"))


def test_a_dataset_that_breaks_off(monkeypatch):
    def rows():
        yield GOOD
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    assert read("owner/name", limit=1) == [GOOD]
    with pytest.raises(UserError, match=r"owner/name\[train\] row 1: cannot be read \(ConnectionError: reset\)"):
        read("owner/name")


def test_a_dataset_that_the_hub_does_not_give():
    with pytest.raises(UserError, match=r"config\.branches\.review\.prompts\.source: no dataset 'no/such'"):
        read("no/such", field="config.branches.review.prompts.source")


class Refused(Exception):
    """An answer of the hub, in the form of its client's errors."""

    response = "404"


@pytest.mark.parametrize("error, offline", [(ConnectionError("no name"), True), (Refused(), False)])
def test_without_a_connection_only_the_cache_is_read(monkeypatch, error, offline):
    """The library would retry for half a minute, and print a warning each time."""
    asked = []

    def dataset_info(self, path, timeout):
        asked.append(path)
        raise error

    def load_dataset(*_, **__):
        assert datasets.config.HF_HUB_OFFLINE == offline
        raise FileNotFoundError

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        with pytest.raises(UserError) as raised:
            read("owner/name:part@0a1b", field="--source")
        assert ("no connection to the hub" in str(raised.value)) == offline
    assert asked == ["owner/name"] * (1 if offline else 2), "one answer is enough, as nothing will be downloaded"


def test_a_dataset_or_parquet_row_that_is_malformed_is_named_by_its_number(monkeypatch, tmp_path):
    rows = [GOOD, {"messages": [{"role": "user", "content": None}], "answer": "B"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(UserError, match=r"owner/name\[test\] row 1: "):
        read("owner/name", "test")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet row 1: "):
        read(str(tmp_path / "rows.parquet"))


def test_null_fields_and_numbers_that_are_not_finite_are_as_if_they_were_not_there(write):
    message = {"role": "user", "content": "hi", "tool_calls": None, "name": None}
    lines = [{"messages": [message], "tools": None, "system": None}, '{"prompt": "a", "x": NaN, "y": -Infinity}']
    assert read(write([*lines, '{"prompt": "b", "z": 1e999}'])) == [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "a"},
        {"prompt": "b"},
    ]


def test_tools_and_their_calls_are_kept(write):
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "day": None}}}]
    messages = [
        {"role": "user", "content": "weather in Bern?", "tool_calls": []},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    (row,) = read(write([{"messages": messages, "tools": tools}]))
    assert row["tools"] == tools
    assert row["messages"] == [
        {"role": "user", "content": "weather in Bern?"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
